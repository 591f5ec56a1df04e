"""AGTCNet, its electrode graphs, and what it is compared with."""

import warnings

import matplotlib as mpl
import mne

# importing braindecode prints warnings about montage names and changes matplotlib's settings
with mne.use_log_level("ERROR"), warnings.catch_warnings(), mpl.rc_context():
    warnings.simplefilter("ignore")
    import braindecode.models  # noqa: F401

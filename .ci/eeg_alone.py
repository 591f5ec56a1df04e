"""In an environment with nearfar-eeg alone: nothing of the other domains is there, and a decoder learns and predicts.

Leaves a decoder folder and a recording in the folder given on the command line.
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

import mne
import numpy as np

from nearfar.eeg import Decoder, NetworkClassifier, Preprocessing, Recipe, load_trials, trials_array

installed = {distribution.metadata["Name"].lower() for distribution in distributions()}
foreign = installed & {"monai", "timm", "transformers", "datasets", "segmentation-models-pytorch"}
assert not foreign, f"nearfar-eeg must not bring {foreign}"

folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
names, rate, cues = ["FC3", "FC4", "C3", "Cz", "C4", "CP3", "CP4", "Pz"], 125.0, np.arange(2.0, 120.0, 4.0)
data = 10e-6 * rng.standard_normal((len(names), int(124 * rate)))
classes = ["left_hand", "right_hand"] * (len(cues) // 2)
for cue, cls in zip(cues, classes):  # a 10 Hz rhythm over the hand's side
    start, times = int(cue * rate), np.arange(int(3 * rate)) / rate
    data[names.index("C3" if cls == "left_hand" else "C4"), start : start + len(times)] += 30e-6 * np.sin(
        2 * np.pi * 10 * times
    )
raw = mne.io.RawArray(data, mne.create_info(names, rate, "eeg"), verbose="ERROR")
raw.set_annotations(mne.Annotations(cues[: len(classes)], 0.0, classes))
raw.save(folder / "recording_raw.fif", verbose="ERROR")

preprocessing = Preprocessing(tmin=0.0, tmax=3.0)
epochs = load_trials(folder / "recording_raw.fif", preprocessing=preprocessing)
X, y, labels = trials_array(epochs)
classifier = NetworkClassifier(Recipe(epochs=20, batch_size=8), epochs.info, device="cpu").fit(X, y)
decoder = Decoder(classifier.network_, labels, preprocessing, epochs.ch_names, {"sfreq": epochs.info["sfreq"]})
decoder.save(folder / "decoder")
accuracy = (Decoder.load(folder / "decoder").predict_proba(X).argmax(1) == y).mean()
assert accuracy > 0.8, f"a rhythm of 30 microvolts must be learnt, accuracy on the training trials is {accuracy}"
print(f"nearfar-eeg alone: {len(installed)} distributions, accuracy on the training trials {accuracy:.2f}")

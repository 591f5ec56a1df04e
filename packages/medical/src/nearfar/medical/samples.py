"""Real scans that come with the dependencies: the MNI152 brain of nilearn's wheel, with its tissue maps."""

from pathlib import Path

import nibabel as nib
import numpy as np

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json

TISSUES = {1: "grey matter", 2: "white matter"}


def write_brain(folder: str | Path, resolution: int = 2) -> Path:
    """Write the MNI152 T1 template as two cases, its right and left half, with tissue labels, to `folder`.

    `images/right.nii.gz`, `labels/right.nii.gz` ... and `labels.json`. A voxel is grey or white matter where that map
    of the template is the larger and at least 1/2. Both halves are of one average of 152 people: a network trained on
    the one is tested on a mirror-like other, which is easier than another person. `resolution` in mm. Needs the extra
    `samples`; nothing is downloaded.
    """
    try:
        from nilearn import datasets, image
    except ImportError as error:
        raise UserError("the brain sample needs nilearn: install nearfar-medical[samples]") from error
    folder = Path(folder)
    brain = datasets.load_mni152_template(resolution=resolution)
    grey = image.resample_to_img(datasets.load_mni152_gm_template(resolution=resolution), brain).get_fdata()
    white = image.resample_to_img(datasets.load_mni152_wm_template(resolution=resolution), brain).get_fdata()
    labels = np.where(grey >= white, 1, 2) * (np.maximum(grey, white) >= 0.5)
    data, middle = brain.get_fdata(dtype=np.float32), brain.shape[0] // 2
    for name, part in (("right", slice(middle, None)), ("left", slice(None, middle))):
        affine = brain.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (part.start or 0)
        for kind, values in (("images", data[part]), ("labels", labels[part].astype(np.uint8))):
            with atomic_path(folder / kind / f"{name}.nii.gz") as temporary:
                nib.save(nib.Nifti1Image(values, affine), temporary)
    write_json(folder / "labels.json", {str(k): v for k, v in TISSUES.items()})
    return folder


def threshold_baseline(image: np.ndarray, train_image: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Tissue by intensity alone: the class whose mean in the training half is nearest, background included."""
    means = np.array([train_image[train_labels == k].mean() for k in range(int(train_labels.max()) + 1)])
    return np.abs(image[..., None] - means).argmin(-1).astype(np.uint8)

"""NIfTI files with one fault of their header or voxels mended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import reading
from nearfar.medical.data.scans import NIFTI, read_header


def mend_nifti(
    path: str | Path,
    output: str | Path,
    *,
    form: str | None = None,
    unit: str | None = None,
    shift: Sequence[int] | None = None,
    mirror: bool = False,
    like: str | Path | None = None,
    fill_nan: bool = False,
) -> Path:
    """Write `output` as `path` but for one fault. Raises UserError for what is no NIfTI file, or cannot be done.

    Args:
        form: "sform" or "qform", to which both are set; where that has no code, the voxel sizes count.
        unit: of length, "mm", "meter" or "micron".
        shift: voxels along right, front and up that a label map is moved by; 0 comes in.
        mirror: the voxels change sides, the header stays.
        like: an image whose grid a label map is brought onto, by nearest neighbour.
        fill_nan: 0 for voxels that are not finite.
    """
    path, output = Path(path), Path(output)
    if not all(p.name.lower().endswith(NIFTI) for p in (path, output)):
        raise UserError(f"{path}: NIfTI files are mended, into NIfTI files")
    with reading(path, "damaged or no NIfTI file"):
        file: Any = nib.load(path)
        data, header = np.asanyarray(file.dataobj), file.header.copy()
    affine = np.array(file.affine, float)
    if form is not None:
        if form not in ("sform", "qform"):
            raise UserError(f"--form {form}: must be sform or qform")
        coded = int(header[f"{form}_code"]) > 0
        affine = np.array(getattr(header, f"get_{form}")() if coded else header.get_base_affine(), float)
    elif unit is not None:
        if unit not in ("mm", "meter", "micron"):
            raise UserError(f"--unit {unit}: must be mm, meter or micron")
        header.set_xyzt_units(unit)
    elif shift is not None or mirror:
        own = io_orientation(affine)
        there = ornt_transform(own, axcodes2ornt("RAS"))
        turned = apply_orientation(data, there)
        if shift is not None:
            if len(shift) != 3 or data.ndim != 3:
                raise UserError(f"{path}: --shift is for three axes, as 0,2,0")
            moved = np.zeros_like(turned)
            to, of = (tuple(slice(max(0, sign * s), n + min(0, sign * s)) for s, n in zip(shift, turned.shape))
                      for sign in (1, -1))  # fmt: skip
            moved[to] = turned[of]
            turned = moved
        else:
            turned = np.flip(turned, 0)
        data = apply_orientation(turned, ornt_transform(axcodes2ornt("RAS"), own))
    elif like is not None:
        target = read_header(like)
        if target.affine is None:
            raise UserError(f"{like}: is a picture, which has no place")
        step = np.linalg.solve(affine, target.affine)
        data = ndimage.affine_transform(data, step[:3, :3], step[:3, 3], target.shape, order=0)
        affine = target.affine
    elif fill_nan:
        data = np.where(np.isfinite(data), data, 0).astype(data.dtype)
    mended = type(file)(data, affine, header, dtype=data.dtype)
    if form is not None or like is not None:
        mended.set_sform(affine, 1)
        mended.set_qform(affine, 1)
    with atomic_path(output) as temporary:
        nib.save(mended, temporary)
    return output

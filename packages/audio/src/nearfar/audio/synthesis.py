"""Synthetic speech from eSpeak NG, for tests and demonstrations that must not download anything.

The library and its data come with the wheel `espeakng-loader` (extra `samples`). Its voices are variants of one
formant synthesizer: easy to tell apart, and nothing like a test of real speakers. Always say that they are synthetic.
"""

import ctypes
import os
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nearfar.core.errors import UserError

VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f4", "f5", "Andy", "Annie", "Diogo", "Gene", "Lee")
"""Voices of clearly different sound."""

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_UTF8 = 1


@cache
def _library() -> tuple[ctypes.CDLL, int, str]:
    """The library, started once per process, its sample rate and the folder of its voice variants."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError("speech synthesis needs espeakng-loader: pip install 'nearfar-audio[samples]'") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    folder = os.path.dirname(espeakng_loader.get_data_path())
    rate = library.espeak_Initialize(2, 0, folder.encode(), 0)  # AUDIO_OUTPUT_SYNCHRONOUS
    if rate <= 0:
        raise UserError(f"eSpeak NG does not start with the data in {folder}")
    return library, rate, os.path.join(espeakng_loader.get_data_path(), "voices", "!v")


def synthesize(
    text: str, variant: str = "m1", language: str = "en", pitch: int = 50, words_per_minute: int = 170
) -> tuple[NDArray[np.float32], int]:
    """Speak `text`; returns samples in [-1, 1] and their rate in Hz (22050).

    A voice flutters a little, so two calls are not equal to the sample. `variant`: one of eSpeak's voice variants, see
    `VARIANTS`. `pitch`: 0 to 99.
    Raises UserError where eSpeak is not installed or has no such voice.
    """
    library, rate, variants = _library()
    pieces: list[NDArray[np.int16]] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    known = os.path.isfile(os.path.join(variants, variant))  # an unknown variant is passed over in silence
    if not known or library.espeak_SetVoiceByName(f"{language}+{variant}".encode()) != 0:
        raise UserError(f"eSpeak NG has no voice {language}+{variant}")
    library.espeak_SetParameter(_RATE, words_per_minute, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    spoken = text.encode()
    library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    if not pieces:
        raise UserError("eSpeak NG gave no sound for this text")
    return np.concatenate(pieces).astype(np.float32) / np.float32(32768), rate

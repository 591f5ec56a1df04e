"""Resemblyzer as an encoder: `nearfar speaker-verification score ... --encoder benchmarks.resemblyzer_encoder:embed`.

Its wheel carries the weights: `uv sync --group encoders`.
"""

import numpy as np
from resemblyzer import VoiceEncoder, preprocess_wav

network = VoiceEncoder("cpu", verbose=False)


def embed(samples: np.ndarray) -> np.ndarray:
    return network.embed_utterance(preprocess_wav(samples, embed.sample_rate))


embed.sample_rate = 16000

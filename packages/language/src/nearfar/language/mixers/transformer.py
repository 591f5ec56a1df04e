"""The parts of today's transformers: rotary and latent attention, and a mixture of experts."""

from nearfar.language.cards import Mixer
from nearfar.ops.attention.grouped import LatentAttention, RotaryAttention
from nearfar.ops.tokens.experts import ExpertMixture

MIXERS = {
    "rotary-attention": Mixer(RotaryAttention, "2 N d", "every key and value"),
    "latent-attention": Mixer(LatentAttention, "N (rank + shared)", "every latent"),
}

STATE_MIXERS = {"experts": Mixer(ExpertMixture)}

"""Networks: tokens + text states → a prediction. One file a network."""

from nar_t2i.networks.causal import CausalDecoder
from nar_t2i.networks.critic import TokenCritic
from nar_t2i.networks.encoder_decoder import EncoderDecoder
from nar_t2i.networks.prefix import PrefixDecoder
from nar_t2i.networks.text_reader import TextReader
from nar_t2i.networks.two_way import TwoWayDecoder
from nar_t2i.networks.uvit import UVit

__all__ = ["CausalDecoder", "EncoderDecoder", "PrefixDecoder", "TextReader", "TokenCritic", "TwoWayDecoder", "UVit"]

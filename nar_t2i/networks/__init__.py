"""Networks: tokens + text states → a prediction. One file a network."""

from nar_t2i.networks.encoder_decoder import EncoderDecoder

__all__ = ["EncoderDecoder"]

"""How a network learns to fill tokens. One file a strategy."""

from nar_t2i.learning.causal import Causal
from nar_t2i.learning.critic import CriticOf
from nar_t2i.learning.masked import Masked
from nar_t2i.learning.prefixes import Prefixes
from nar_t2i.learning.progressive import Progressive
from nar_t2i.learning.replaced import Replaced
from nar_t2i.learning.self_conditioned import SelfConditioned
from nar_t2i.learning.unrolled import Unrolled

__all__ = ["Causal", "CriticOf", "Masked", "Prefixes", "Progressive", "Replaced", "SelfConditioned", "Unrolled"]

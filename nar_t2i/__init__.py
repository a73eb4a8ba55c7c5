"""nar_t2i: non-autoregressive text-to-image models, trained, compared and served."""

__version__ = "0.1.0"

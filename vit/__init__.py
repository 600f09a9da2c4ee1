"""A vision transformer that can be trained, used and looked into."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit.predictor import Explanation, ImageError, Prediction, Predictor

__version__ = "0.1.0"
__all__ = ["Explanation", "ImageError", "Prediction", "Predictor"]


def __getattr__(name: str) -> Any:
    """``from vit import Predictor`` without paying for torch when only ``--help`` is wanted."""
    if name in __all__:
        import vit.predictor

        return getattr(vit.predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

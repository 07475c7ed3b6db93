"""Peak memory of a training step, counted on fake tensors: no GPU, no allocation, the same bytes every time."""

from .cards import CARDS, Card, card
from .ledger import WORKSPACES, Ledger
from .precision import mixed_precision
from .products import PRODUCTS
from .workspaces import workspace_bytes

__all__ = ["CARDS", "PRODUCTS", "WORKSPACES", "Card", "Ledger", "card", "mixed_precision", "workspace_bytes"]

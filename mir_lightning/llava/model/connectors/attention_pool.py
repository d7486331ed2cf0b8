"""One layer of attention from learned queries."""

from typing import Any

from torch import Tensor, nn

from mir_lightning.llava.model.connectors.queries import QueryConnector, heads


class _CrossAttention(nn.MultiheadAttention):
    def forward(self, queries: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(queries, features, features, need_weights=False)[0]


def attention_pool(config: Any) -> QueryConnector:
    """Learned queries attend to the features (MM1, arXiv 2403.09611, section 3.2)."""
    width = config.vision_config.hidden_size
    return QueryConnector(config, _CrossAttention(width, heads(width), batch_first=True))

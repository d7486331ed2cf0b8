"""A small transformer of learned queries."""

from typing import Any

from torch import nn

from mir_lightning.llava.model.connectors.queries import QueryConnector, heads


def resampler(config: Any, depth: int = 3) -> QueryConnector:
    """``depth`` blocks of self-attention, cross-attention to the features, and an MLP.

    The Q-Former's (BLIP-2, arXiv 2301.12597, section 3.1), untrained, without its text.
    """
    width = config.vision_config.hidden_size
    block = nn.TransformerDecoderLayer(
        width, heads(width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    blocks = nn.TransformerDecoder(block, depth, nn.LayerNorm(width))
    for parameter in blocks.parameters():  # the blocks are copies of one
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return QueryConnector(config, blocks)

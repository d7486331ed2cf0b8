"""Doors into training loops."""

from mir_lightning.callbacks.captions import CaptionCallback
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.callbacks.image_gain import ImageGainCallback
from mir_lightning.callbacks.mir import MIRCallback
from mir_lightning.callbacks.sds import SDSCallback

__all__ = ["CaptionCallback", "FewShotCallback", "ImageGainCallback", "MIRCallback", "SDSCallback"]

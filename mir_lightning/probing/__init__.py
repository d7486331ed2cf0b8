"""Run a fixed probe through a live model."""

from mir_lightning.probing.choices.evaluate import ChoiceResult, evaluate_choices
from mir_lightning.probing.choices.few_shot import FewShotProbe, FewShotResult, evaluate_few_shot
from mir_lightning.probing.choices.items import ChoiceItem, load_choice_items
from mir_lightning.probing.choices.m3_bench import load_m3_bench
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.image_gain import ImageGainResult, evaluate_image_gain
from mir_lightning.probing.probe import Probe

__all__ = [
    "ChoiceItem",
    "ChoiceProbe",
    "ChoiceResult",
    "FewShotProbe",
    "FewShotResult",
    "ImageGainResult",
    "MIRResult",
    "Probe",
    "evaluate_choices",
    "evaluate_few_shot",
    "evaluate_image_gain",
    "evaluate_mir",
    "load_choice_items",
    "load_m3_bench",
]

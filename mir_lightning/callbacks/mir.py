"""``MIRCallback``: MIR curves of a training run, from one line in ``Trainer(callbacks=[...])``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mir_lightning.callbacks import figures
from mir_lightning.callbacks.alarms import label_fault
from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.callbacks.loggers import check_source
from mir_lightning.callbacks.loops import Drawing, Loop
from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.frechet import RankOrder
from mir_lightning.functional.mir import Rule, Variant
from mir_lightning.probing.evaluate import MIRResult, Products, UncheckedMaskWarning, evaluate_mir
from mir_lightning.probing.network import HiddenStates, Network, ProbeWarning
from mir_lightning.probing.probe import ProbeLike
from mir_lightning.vlm import TextPositions, find_entrance, is_foreign, module_at, token_masks


class MIRCallback(ProbingCallback):
    """Evaluate the Modality Integration Rate of the model in training, on a fixed probe.

    Logged to every logger of the Trainer, and set in ``trainer.callback_metrics`` (so that
    ``ModelCheckpoint(monitor="mir")`` works): ``mir`` and ``mir_robust`` (by an outlier rule that many massive
    tokens cannot mask). To the loggers only: ``mir_layers/layer_01`` and on, ``mir_norm/layer_01`` and on with
    ``mir_norm/mean`` (norm of vision over text tokens), ``mir_equal_norm`` (MIR but for that ratio),
    ``mir_gap/mean`` and ``mir_gap/covariance`` (parts of the distance, summed over layers),
    ``mir_rank/vision`` and ``mir_rank/text`` (mean effective rank, the participation ratio),
    ``mir_outliers/vision`` and ``mir_outliers/text`` (share of the tokens), ``mir_massive/vision`` and
    ``mir_massive/text`` (share outside the robust rule), and with labels in the probe ``mir_probe/loss`` and
    ``mir_probe/perplexity``; where each batch of the probe names one ``source``, ``mir_sources/<source>``;
    pictures ``mir_media/overview``, ``mir_media/layers``, ``mir_media/heatmap`` and ``mir_media/tokens``.

    Args:
        probe: a :class:`~mir_lightning.Probe`, a ``DataLoader``, a list of batches, or a zero-argument
            callable that makes one when the fit starts.
        every_n_steps: optimizer steps between evaluations; ``None`` for none.
        at_start: evaluate before the first step.
        at_end: evaluate after the last step.
        variant: of ``mir``: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``.
        text: which positions count as text: ``"after_vision"`` or ``"all"``.
        model: dotted path of the Hugging Face model inside the LightningModule; found by itself when None.
        name: prefix of everything logged; choose another for a second probe.
        hidden_states: for models that are not Hugging Face's, see :func:`~mir_lightning.evaluate_mir`; called
            with the LightningModule (or what is at ``model``) and a batch.
        picture_layer: decoder layer, counted from 1, whose tokens are drawn; the middle one when None.
        layers: dotted path of the decoder layers inside the model; found by a rule when None.
        norm: dotted path of the final norm inside the model; found beside the layers when None.
        image_token_id: placeholder of vision tokens in ``input_ids``; that of the model's config when None.
        check: see that the vision mask is right, at the first evaluation in which pixels reach the decoder; see
            :func:`~mir_lightning.evaluate_mir`.
        interval: also log ``mir_se``, the standard error of ``mir``, for one more pass over the probe.
        rank_order: of ``mir_rank``; see :func:`~mir_lightning.evaluate_mir`.
        products: see there.
        options: further schedules, ``on_error`` and more: of
            :class:`~mir_lightning.callbacks.base.ProbingCallback`.
    """

    label = "MIR"
    best = "min"
    evaluator = staticmethod(evaluate_mir)

    def __init__(
        self,
        probe: ProbeLike,
        every_n_steps: int | None = 500,
        at_start: bool = True,
        at_end: bool = True,
        variant: Variant = "paper",
        text: TextPositions = "after_vision",
        model: str | None = None,
        name: str = "mir",
        hidden_states: HiddenStates | None = None,
        picture_layer: int | None = None,
        layers: str | None = None,
        norm: str | None = None,
        image_token_id: int | None = None,
        check: bool = True,
        interval: bool = False,
        rank_order: RankOrder = 2,
        products: Products = "auto",
        **options: Any,
    ) -> None:
        check_choice("variant", variant, Variant)
        check_choice("text", text, TextPositions)
        super().__init__(probe, every_n_steps, at_start, at_end, model, name, **options)
        if interval and variant not in get_args(Rule):
            raise ValueError(f'interval needs variant "paper" or "robust", got {variant!r}.')
        check_choice("rank_order", rank_order, RankOrder)
        check_choice("products", products, Products)
        self.engine = {"variant": variant, "text": text, "sample_layer": picture_layer}
        self.engine |= {"interval": interval, "rank_order": rank_order, "products": products}
        self.places: dict[str, Any] = {"layers": layers, "norm": norm, "image_token_id": image_token_id}
        self.places["hidden_states"] = hidden_states
        self.check = check and hidden_states is None
        self._config: Any = None
        self._looked_at_labels = False

    def prepare(self, module: nn.Module) -> dict[str, Any]:
        """Find the model and check the probe."""
        inside = module_at(module, "model", self.model or "")
        foreign = self.places["hidden_states"] is not None or is_foreign(inside, self.places["layers"])
        self.network = inside if foreign else find_entrance(module, self.model)
        self.probe = probe = self.make_probe(self.probe)
        for source in probe.by_source():
            check_source(source)
        network = Network(self.network, **self.places)
        self._config = None if network.vlm is None else network.vlm.config
        masks = network.masks(probe, self.engine["text"])
        self._warn_of_labels("the probe", probe, [mask.vision for mask in masks])
        network.check_layer("picture_layer", self.engine["sample_layer"])
        if network.device.type == "cuda":
            probe.pin_memory()
        return {"variant": self.engine["variant"], "text": self.engine["text"], "probe_batches": len(probe)}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the labels of the first batch."""
        seen, self._looked_at_labels = self._looked_at_labels, True
        if seen or not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
            return
        try:
            vision = token_masks(self._config, batch, "all", self.places["image_token_id"]).vision
        except ValueError:  # a batch that is no probe's, of which nothing is asked
            return
        self._warn_of_labels("training", [batch], [vision])

    def _warn_of_labels(self, where: str, batches: Iterable[Mapping[str, Any]], vision: list[Tensor]) -> None:
        if fault := label_fault(batches, vision):
            self.warn_once(f"{self.name}: in {where}, {fault}", f"labels of {where}")

    def measure(self, loop: Loop) -> MIRResult:
        """Run the probe, with the self-check until it has found the mask right."""
        self.engine |= {**self.places, "check": self.check}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncheckedMaskWarning)  # a silent projector may speak later
            warnings.simplefilter("ignore", ProbeWarning)  # said at the start
            result: MIRResult = super().measure(loop)
        self.check &= not result.checked
        return result

    def end(self, loop: Loop) -> None:
        """Last step; and what the self-check could not tell."""
        super().end(loop)
        if self.check and self.history:
            message = f"{self.name}: no evaluation could check the vision mask: pixels never reached the decoder."
            self.warn_once(message, message)

    def values(self, result: MIRResult) -> dict[str, float]:
        """Everything a logger can plot."""
        name, tokens = self.name, torch.tensor([result.vision_tokens, result.text_tokens])
        values = {name: result.mir, f"{name}_robust": result.mir_robust}
        values[f"{name}_equal_norm"] = result.mir_equal_norm
        values[f"{name}_norm/mean"] = result.norm_ratio.mean().item()
        values[f"{name}_gap/mean"] = result.mean_gap.sum().item()
        values[f"{name}_gap/covariance"] = result.cov_gap.sum().item()
        if result.standard_error is not None:
            values[f"{name}_se"] = result.standard_error
        values |= {f"{name}_sources/{source}": found.mir for source, found in result.sources.items()}
        for reading, of_layers in (
            ("rank", result.effective_rank),
            ("outliers", result.outliers / tokens),
            ("massive", result.massive / tokens),
        ):
            vision, text = of_layers.mean(dim=0).tolist()
            values |= {f"{name}_{reading}/vision": vision, f"{name}_{reading}/text": text}
        if result.loss is not None and result.perplexity is not None:
            values |= {f"{name}_probe/loss": result.loss, f"{name}_probe/perplexity": result.perplexity}
        for layer, (distance, ratio) in enumerate(zip(result.layers, result.norm_ratio, strict=True), start=1):
            values[f"{name}_layers/layer_{layer:02d}"] = distance.item()
            values[f"{name}_norm/layer_{layer:02d}"] = ratio.item()
        return values

    def monitored(self, result: MIRResult) -> dict[str, float]:
        """MIR by both outlier rules."""
        return {self.name: result.mir, f"{self.name}_robust": result.mir_robust}

    def draw(self, result: MIRResult, step: int) -> Drawing:
        """The layers now, over all steps, and some tokens of one."""
        columns, rows = figures.layer_table(vars(result))
        keys = [key for key in self.history[-1] if key.startswith(f"{self.name}_layers/")]
        distances = [[point[key] for key in keys] for point in self.history]
        return {
            "overview": figures.overview_figure(self.points(), result, step),
            "layers": figures.layer_figure(vars(result), f"Step {step}: MIR {result.mir:.3f}"),
            "heatmap": figures.heatmap_figure([point["step"] for point in self.history], distances),
            "tokens": figures.token_figure(result, step),
        }, (["step", *columns], [[step, *row] for row in rows])

    def readings(self, row: Mapping[str, Any]) -> dict[str, float]:
        """MIR with its standard error, loss, rank and norm ratio."""
        names = {"mir": "", "mir_error": "_se", "mir_loss": "_probe/loss", "rank": "_rank/vision"}
        names["norm_ratio"] = "_norm/mean"
        found = {key: row.get(f"{self.name}{name}") for key, name in names.items()}
        return {key: value for key, value in found.items() if value is not None}

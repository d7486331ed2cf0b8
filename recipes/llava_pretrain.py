"""Pre-train a LLaVA-style vision-language model and watch its Modality Integration Rate.

    python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml [--config more.yaml] [--key value]

Every option: ``fit --help``; the configuration a command would run: add ``--print_config``.
"""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mir_lightning import MIRCallback
from mir_lightning.callbacks.reporting import curve_figure, picture_folder
from mir_lightning.llava.console import MIRProgressBar, closing_report
from mir_lightning.llava.data import PretrainingData
from mir_lightning.llava.module import LlavaPretraining


class RecipeCLI(LightningCLI):
    """A Trainer, the model, its data, and MIR on a held-out probe of that data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """MIR's options under ``--mir``, its probe from the data, the progress bar under ``--progress``."""
        parser.add_lightning_class_args(MIRCallback, "mir")
        parser.link_arguments("data", "mir.probe", compute_fn=lambda data: data.probe, apply_on="instantiate")
        parser.add_lightning_class_args(MIRProgressBar, "progress")

    def after_fit(self) -> None:
        """Save the model, draw the curves, and say where everything is."""
        trainer = self.trainer
        if not trainer.is_global_zero:
            return
        callback: MIRCallback = self._get(self.config_init, "mir")
        root = Path(trainer.default_root_dir)
        self.model.save_pretrained(root / "model")
        folder = picture_folder(trainer, callback.name)
        curves = folder / "curves.png"
        if callback.history:
            curve_figure(callback.history).savefig(curves)
        print(closing_report(trainer, callback, [curves] if callback.history else [], root / "model"))


def main() -> None:
    """Run the command line."""
    RecipeCLI(
        LlavaPretraining,
        PretrainingData,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()

"""Pre-train a LLaVA-style vision-language model and watch its Modality Integration Rate.

    python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml [--config more.yaml] [--key value]

Every option: ``fit --help``; the configuration a command would run: add ``--print_config``. The same command goes
on where an interrupted run stopped.
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("loading PyTorch, Lightning and Transformers", file=sys.stderr, flush=True)  # takes seconds

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from mir_lightning import ImageGainCallback, SDSCallback
from mir_lightning.callbacks.captions import CaptionCallback
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.callbacks.loggers import picture_folder
from mir_lightning.llava import console, probes, trainer
from mir_lightning.llava.costs import Throughput
from mir_lightning.llava.data.module import PretrainingData
from mir_lightning.llava.model.module import LlavaPretraining
from mir_lightning.llava.model.saving import ExportingCheckpoint, export_trained
from mir_lightning.report import Run, report_figure

RUN_FOLDER = "default_root_dir"  # as a logger's save_dir it stands for trainer.default_root_dir


class RecipeCLI(LightningCLI):
    """A Trainer, the model, its data, and MIR on a held-out probe of that data; methods in the order they run."""

    preemption = trainer.Preemption()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit`` alone: there is no other loop, and each has a parser of all options, which takes a second."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--mir`` and what else is asked of the model; ``--checkpoint`` keeps the best, ``--restart`` last."""
        for callback, target, items in (
            (ImageGainCallback, "image_gain.probe", probes.gain_probe),
            (SDSCallback, "sds.items", probes.choices),
            (FewShotCallback, "few_shot.items", probes.few_shot),
            (FewShotCallback, "answers.items", probes.answers),
            (CaptionCallback, "captions.items", probes.captions),
        ):
            name = target.partition(".")[0]
            parser.add_lightning_class_args(callback, name)
            parser.set_defaults({f"{name}.name": name})
            make = partial(partial, items)  # given the data, the items are made when the fit starts
            parser.link_arguments("data", target, compute_fn=make, apply_on="instantiate")
        parser.add_lightning_class_args(probes.RecipeMIR, "mir")  # after the gain, whose points its overview shows
        for when, name in itertools.product(("every_n_steps", "at_steps"), ("image_gain", "captions")):
            parser.link_arguments(f"mir.{when}", f"{name}.{when}")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(console.MIRProgressBar, "progress")
        best = {"monitor": "mir", "mode": "min", "filename": "{step}-{mir:.3f}"}
        last = {"filename": trainer.LAST, "enable_version_counter": False, "every_n_train_steps": 100}
        for name, kind, defaults in (
            ("checkpoint", ExportingCheckpoint, best),
            ("restart", trainer.BetweenSteps, last),
        ):
            parser.add_lightning_class_args(kind, name)
            parser.link_arguments(f"trainer.{RUN_FOLDER}", f"{name}.dirpath", compute_fn=trainer.checkpoint_folder)
            parser.set_defaults({f"{name}.{key}": value for key, value in defaults.items()})
        parser.link_arguments("mir.every_n_steps", "checkpoint.every_n_train_steps", compute_fn=lambda n: n or 1)

    def before_instantiate_classes(self) -> None:
        """Loggers in the run's folder; no bar where the Trainer shows none; nothing is asked without items."""
        options = self.config[self.subcommand]
        loggers = options.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            given: Any = getattr(logger, "init_args", {})  # true, false and null have none
            if given.get("save_dir") == RUN_FOLDER:
                given.save_dir = options.trainer.default_root_dir or "."
        needed = {
            "progress": options.trainer.enable_progress_bar is not False,
            "throughput": options.trainer.logger is not False,
            "image_gain": options.data.gain_samples,
            "captions": options.data.caption_pictures,
            "sds": options.data.shapes_choices or options.data.choice_items,
            "few_shot": options.data.shapes_few_shot,
            "answers": options.data.answers,
        }
        callbacks = self._parser(self.subcommand).callback_keys
        callbacks[:] = [name for name in callbacks if needed.get(name, True)]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer whose runs can be killed and started again."""
        callbacks = self._get(self.config_init, "trainer").callbacks or []
        callbacks = [*callbacks, trainer.SeededBatches(), trainer.Divergence(), self.preemption]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def before_fit(self) -> None:
        """Divide the global batch, say what is about to run, and find the checkpoint of an interrupted run."""
        self.datamodule.accumulate(self.trainer)
        if self.trainer.is_global_zero:
            trainer.remove_leftovers(self.trainer)
        rank_zero_info(console.start_table(self.trainer, self.datamodule.batch_size))
        options = self.config_init[self.subcommand]
        options.ckpt_path = options.ckpt_path or trainer.interrupted_run(self.trainer)

    def after_fit(self) -> None:
        """Save the model, draw the curves, and say where everything is."""
        if self.preemption.stopped:
            return
        model = Path(self.trainer.default_root_dir) / "model"
        export_trained(self.trainer, model, last=True)
        if self.trainer.is_global_zero:
            mark = trainer.finished_mark(self.trainer)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            mir = self._get(self.config_init, "mir")
            curves = [picture_folder(self.trainer, mir.name) / "curves.png"] if mir.history else []
            for picture in curves:
                rows = itertools.chain(*(other.history for other in trainer.probing_callbacks(self.trainer)))
                report_figure([Run.of(rows)]).savefig(picture)
            print(console.closing_report(self.trainer, mir, curves, model))


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    RecipeCLI(
        LlavaPretraining,
        PretrainingData,
        args=args,
        trainer_class=trainer.RecipeTrainer,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
    )


if __name__ == "__main__":
    main()

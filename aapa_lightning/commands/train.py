"""``aapa fit|validate|test|predict``: Lightning's command line with a run folder."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache
from typing_extensions import override

from aapa_lightning.callbacks.checkpoints import place_checkpoints
from aapa_lightning.callbacks.progress import progress_bars
from aapa_lightning.callbacks.run_folder import ResponseWriter, RunCheckpoint, RunFolder
from aapa_lightning.callbacks.samples import SampleWriter
from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.cli import TRAINER_COMMANDS
from aapa_lightning.commands import resume
from aapa_lightning.commands.config_files import as_list, default_run_dir, names_data_class
from aapa_lightning.commands.parser import Parser, import_components, parser_kwargs, tell_numbers_apart
from aapa_lightning.console import say
from aapa_lightning.documents import load_yaml
from aapa_lightning.errors import ConfigError, users_cause
from aapa_lightning.export import export_policy
from aapa_lightning.files import write_json
from aapa_lightning.locks import hold
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.runs import KEPT, MetricsCSV, RunBoard, check_beginning, find_checkpoint, holds_run, last_checkpoint, sweep_run
from aapa_lightning.strategies import FSDP2Strategy  # noqa: F401 - registers itself as fsdp2
from aapa_lightning.system import refusal, writing

#: The data module of a configuration that names none.
DEFAULT_DATA = {"class_path": "aapa_lightning.data.datamodule.AapaDataModule"}
#: How torch begins to say that a state does not fit.
_OTHER_STATE = r"Error\(s\) in loading state_dict for \w+:|(?=loaded state dict (has a different|contains a parameter group))"
#: Keys of one command's call, left out of the saved configuration so that every command reads it.
CALL_KEYS = ("config", "resume", "test", "ckpt_path", "weights_only", "verbose", "return_predictions")


def run_trainer(arguments: list[str], cli: type[AapaCLI] | None = None) -> int:
    """Run one of the trainer commands; ``arguments`` starts with its name. ``cli`` is the class that does, AapaCLI if left out."""
    import_components()
    warnings.filterwarnings("ignore", message=r"[\s\S]*(deprecated in v4|JSONARGPARSE_DEPRECATION)")  # calls of LightningCLI
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's call of torch's trees
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # a run without validation
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
    (cli or AapaCLI)(arguments)
    return 0


class AapaCLI(LightningCLI):
    """Lightning's command line in subclass mode, with our run folder, loggers, checkpoints and no surprises.

    ``trainer.callbacks`` of the configuration come first, then ours; ``trainer.logger`` is kept beside ``metrics.csv``.

    Args:
        arguments: command-line arguments, or None for those of the process.
        run: build a parser with the four commands and run the chosen one; else only build the classes.
    """

    def __init__(self, arguments: list[str], run: bool = True) -> None:
        self._arguments = arguments
        tell_numbers_apart()
        descriptions = {name: parser_kwargs(name) for name in TRAINER_COMMANDS}
        with ExitStack() as self._held, self._users_errors():
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=None,
                trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 1},
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={"prog": "aapa", **(descriptions if run else {})},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=arguments,
                run=run,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    @contextmanager
    def _users_errors(self) -> Iterator[None]:
        """Say in one line that the run's folder could not be written, whoever tried, or that a checkpoint is another model's."""
        try:
            yield
        except Exception as error:
            run_dir, checkpoint = getattr(self, "run_dir", None), getattr(self, "checkpoint", None)
            if checkpoint is not None and (found := re.match(_OTHER_STATE, str(error))):
                what = " ".join(str(error)[found.end() :].split())
                raise ConfigError(
                    f"{checkpoint} holds the state of another model or optimiser ({what[:300]}); set it as in the config.yaml of the "
                    "run that wrote it"
                ) from error
            if run_dir is None or users_cause(error) is not error or refusal(error, run_dir) is None:
                raise
            with writing(run_dir, run_dir):
                raise

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        default = "runs/MODULE or runs/OBJECTIVE, with aapa- before it if anchored"
        parser.add_argument("--run_dir", type=str | None, default=None, help=f"Folder of the run (default: {default}).")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        if not names_data_class(self._arguments):
            parser.set_defaults({"data": DEFAULT_DATA})

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume", type=bool, default=False, help="Continue the run folder's last checkpoint.", nargs="?", const=True
            )
            parser.add_argument("--test", type=bool, default=False, help="Measure on the test split afterwards.", nargs="?", const=True)
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            raise ConfigError(f"a configuration file that another one names is not UTF-8: {error}; save it as UTF-8") from error

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would replace arguments by what an earlier run saved, without a word."""

    @override
    def before_instantiate_classes(self) -> None:
        self.run_dir = Path(
            self._get(self.config, "run_dir") or default_run_dir(self._get(self.config, "model"), self._get(self.config, "trainer"))
        )
        self.resume = bool(self._get(self.config, "resume", False))
        self.checkpoint = self._get(self.config, "ckpt_path")
        self._step = 0
        if self.subcommand and not self._dry and first_process():
            self._enter()
        if self.subcommand == "fit":
            self._claim()
        elif self.subcommand and self.checkpoint is None and (last := find_checkpoint(self.run_dir)):
            self.checkpoint = str(last)
        if self.subcommand and self.checkpoint is not None:
            self._read(self.checkpoint)
        if self.subcommand not in (None, "fit") and not _get_rank():
            say(f"{self.subcommand}: weights of {self.checkpoint or f'the configured model, no checkpoint given or in {self.run_dir}'}")

    def _enter(self) -> None:
        """Be the only process that runs this command in the folder, and remove what a killed one left there."""
        mend = "wait for it, end it, or choose another folder with --run_dir"
        self._held.enter_context(hold(self.run_dir / f".{self.subcommand}.lock", ["aapa", *self._arguments], mend))
        sweep_run(self.run_dir)

    def _claim(self) -> None:
        """Refuse a folder that holds another run; find the checkpoint to continue, if the run has come so far."""
        if self.resume:
            if self.checkpoint is None and (last := find_checkpoint(self.run_dir)):
                self.checkpoint = str(last)
            if self.checkpoint is None:
                check_beginning(self.run_dir)
                if not _get_rank():
                    say(f"--resume: {self.run_dir} holds no checkpoint yet; starting from the beginning")
            MetricsCSV(self.run_dir).check()
        elif first_process() and not self._dry and holds_run(self.run_dir):
            raise ConfigError(
                f"{self.run_dir} already holds a run; continue it with --resume, choose another folder with --run_dir, or remove it"
            )

    def _read(self, checkpoint: str) -> None:
        """Refuse a checkpoint that is none; in training also what would make another run of it, and tell what else has changed."""
        training = self.subcommand == "fit"
        saved = resume.read_run(checkpoint, training=training)
        self._step = int(saved["global_step"])
        changed = resume.compare(saved.get(KEPT), self._resolved()) if training else []
        if changed and not _get_rank():
            say(f"resume: changed since the checkpoint, and counts from step {self._step} on: {', '.join(changed)}")

    @property
    def _dry(self) -> bool:
        return bool(self._get(self.config, "trainer").get("fast_dev_run"))

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a constructor raises, layer by layer
            raise users_cause(error) from None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        config["default_root_dir"] = str(self.run_dir)
        config["logger"] = self._loggers(config["logger"])
        place_checkpoints(as_list(config["callbacks"]), last_checkpoint(self.run_dir).parent)
        config["plugins"] = plugins = as_list(config["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        try:
            return self._instantiate_trainer(config, self._callbacks(config))
        except (MisconfigurationException, ValueError) as error:
            if config["accelerator"] not in ("gpu", "cuda") or not re.search(
                "No supported gpu backend|can not run on your system", str(error)
            ):
                raise ConfigError(f"trainer: {error}") from error
            found = f"torch {torch.__version__} finds none; use --trainer.accelerator cpu, or install a torch built for your GPU"
            raise ConfigError(f"trainer.accelerator {config['accelerator']}: expected a GPU, {found}") from error

    def _loggers(self, chosen: Any) -> bool | list[Logger]:
        """Ours first, then the configuration's; none for ``logger: false`` and outside training."""
        if chosen is False or self.subcommand != "fit":
            return False
        ours: list[Logger] = [MetricsCSV(self.run_dir)]
        if chosen in (None, True) and RequirementCache("tensorboard"):
            purge: dict[str, Any] = {"purge_step": self._step} if self.resume else {}
            ours.append(RunBoard(self.run_dir, name="tensorboard", version="", **purge))
        if chosen in (None, True):
            return ours
        return ours + as_list(chosen)

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        ours: list[Callback] = []
        if self.subcommand == "predict":
            ours.append(ResponseWriter(self._response_file()))
        elif self.subcommand == "fit" and not self._dry:
            ours.append(RunFolder(self.run_dir, self._resolved()))
            if not any(isinstance(callback, SampleWriter) for callback in as_list(config["callbacks"])):
                ours.append(SampleWriter())
        ours += progress_bars(as_list(config["callbacks"]), config["enable_progress_bar"] is not False)
        return ours if self._dry or config["enable_checkpointing"] is False else [*ours, self._get(self.config_init, "checkpoint")]

    def _response_file(self) -> Path:
        path = self.run_dir / "responses.jsonl"
        if not _get_rank() and path.exists():
            raise ConfigError(f"{path} already exists; choose another folder with --run_dir, or remove the file")
        return path

    def _resolved(self) -> str:
        """The configuration as text that every trainer command accepts as ``--config``."""
        dump = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_link_targets=False, format="yaml")
        config = {key: value for key, value in load_yaml(dump).items() if key not in CALL_KEYS}
        return yaml.safe_dump(config | {"run_dir": str(self.run_dir)}, sort_keys=False)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint, "weights_only": True}
        return kwargs | ({"return_predictions": False} if subcommand == "predict" else {})

    def after_fit(self) -> None:
        """Export the model where its module can, then measure on the test split where asked."""
        if self._dry:
            return
        self._export()
        if self._get(self.config, "test"):
            self.test(model=self.model, datamodule=self.datamodule)

    def before_fit(self) -> None:
        """Policies' loaders start where the checkpoint stopped, so Lightning need not warn that plain loaders do not."""
        if isinstance(self.model, InferenceModule):
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def _export(self) -> None:
        """The module's own ``export(folder)``, called on every rank, or the policy of the last checkpoint."""
        folder, last = self.run_dir / "export", last_checkpoint(self.run_dir)
        if callable(getattr(self.model, "export", None)):
            self.model.export(folder)
        elif isinstance(self.model, InferenceModule) and last.exists() and self.trainer.is_global_zero:
            export_policy(last, folder)
        self.trainer.strategy.barrier()

    def test(self, **kwargs: Any) -> None:
        """Measure on the test split and write ``test_metrics.json``."""
        self._write_metrics("test_metrics.json", self.trainer.test(**kwargs))

    def validate(self, **kwargs: Any) -> None:
        """Measure on the validation split and write ``val_metrics.json``."""
        self._write_metrics("val_metrics.json", self.trainer.validate(**kwargs))

    def _write_metrics(self, name: str, results: Any) -> None:
        if self.trainer.is_global_zero and not self._dry:
            write_json(self.run_dir / name, {key: float(value) for row in results for key, value in row.items()})


def first_process() -> bool:
    """Return whether this is the first process of the run: rank 0, or the one that starts the other ranks."""
    return not _get_rank() and not int(os.environ.get("NODE_RANK") or 0)

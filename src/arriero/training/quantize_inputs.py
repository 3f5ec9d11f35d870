"""What `quantize` is given, looked at before the work."""

from __future__ import annotations

from arriero.config.data import DataOptions
from arriero.config.model import ModelOptions
from arriero.config.quantization import QuantizeOptions
from arriero.data.calibration import check_text
from arriero.data.sft import encode_all
from arriero.data.sources import check_data
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.loading import model_folder
from arriero.errors import ConfigError
from arriero.formats.peft import is_adapter
from arriero.formats.staging import check_target
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig
from arriero.training.scoring import rows_to_score

_LENGTH = 512  # tokens of a calibration piece, where the model has so many positions


def check_inputs(quantize: QuantizeOptions, model: ModelOptions) -> None:
    """Refuse what would fail only after minutes of work.

    Raises:
        ConfigError: an output that holds something or cannot be written, an adapter in the place of a model, or pieces of
            text that are longer than its context.
        DataError: a text that is not there.
        FormatError: a model that is not there.
    """
    check_target(quantize.output_path, "--output_path")
    if quantize.data_file is not None:
        check_text(quantize.data_file)
    folder = model_folder(model.model_name_or_path, model.cache_dir)
    if is_adapter(folder):
        raise ConfigError(
            f"--model_name_or_path {folder} is an adapter: join it with its base first, by "
            f"`arriero merge --lora_path {folder} ...`, and quantize the result"
        )
    if quantize.data_file is not None:
        calibration_length(quantize, read_config(folder))


def calibration_length(quantize: QuantizeOptions, config: LlamaConfig) -> int:
    """Tokens of a piece of text to calibrate and to measure on.

    Raises:
        ConfigError: more are asked for than the model has positions: what it computes beyond them is not what it was
            trained for.
    """
    context, given = config.max_position_embeddings, quantize.calibration_length
    if given is not None and given > context:
        raise ConfigError(
            f"--calibration_length {given} is above the model's context of {context} (max_position_embeddings): give at "
            f"most {context}, or leave it out"
        )
    return min(_LENGTH, context) if given is None else given


def check_rows(data: DataOptions, model: ModelOptions) -> None:
    """Read and encode the rows of the task's scores, which come after the work, as they will be then.

    Raises:
        ConfigError, DataError: rows that are not there, or that cannot be used.
        FormatError: a tokenizer that is not there.
    """
    check_data(data.dataset_path, data.data_name, data.task_name)
    tokenizer = load_tokenizer(model_folder(model.tokenizer_name_or_path or model.model_name_or_path, model.cache_dir))
    encode_all(rows_to_score(data), tokenizer, data.lengths, train_on=data.train_on)

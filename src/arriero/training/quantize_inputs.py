"""What `quantize` is given, looked at before the work."""

from __future__ import annotations

from arriero.config.model import ModelOptions
from arriero.config.quantization import QuantizeOptions
from arriero.data.calibration import check_text
from arriero.engine.loading import model_folder
from arriero.errors import ConfigError
from arriero.formats.peft import is_adapter
from arriero.formats.staging import check_target


def check_inputs(quantize: QuantizeOptions, model: ModelOptions) -> None:
    """Refuse what would fail only after minutes of work.

    Raises:
        ConfigError: an output that holds something or cannot be written, or an adapter in the place of a model.
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

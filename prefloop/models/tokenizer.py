"""A model folder's tokenizer, loaded without what loads models: `prefloop check` renders templates with it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefloop.errors import ModelError
from prefloop.models.sources import ModelOptions, reason


def load_tokenizer(folder: Path, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the template that the options name. Raises ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedy = (
            "set model.source to a folder whose config.json is whole"
            if "config.json" in str(error)
            else "put the tokenizer's files beside the weights"
        )
        raise ModelError(f"{folder} has no usable tokenizer: {reason(error)}; {remedy}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if options.chat_template is not None:
        try:
            template = Path(options.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"model.chat_template {options.chat_template} cannot be read: {reason(error)}"
            ) from error
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {options.source} has no chat template; "
            "set model.chat_template to the path of a jinja file"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {options.source} has neither pad nor EOS token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

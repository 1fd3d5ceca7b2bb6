"""Tokenizers of the paper's models as Hugging Face directories, made from the files in PyPI wheels.

Llama-3: llama_models (tiktoken format), converted by transformers. Mistral-7B (also Zephyr's): mistral_common
(SentencePiece), as it is or converted by transformers. Phi-3: no wheel has it; its tokenizer is Llama-2's kind with
tokens of its own behind the vocabulary, so it is made of Mistral's vocabulary, Phi-3's added tokens and their flags.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from tokenizers import AddedToken, processors
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import LlamaConverter, SentencePieceExtractor, TikTokenConverter

ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_FIRST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)

LLAMA3_SPECIAL = (
    ["<|begin_of_text|>", "<|end_of_text|>"]
    + [f"<|reserved_special_token_{i}|>" for i in range(4)]
    + ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    + [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
)
# ids 32000 to 32010 of Phi-3-mini-4k-instruct
PHI3_ADDED = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]


def wheel_file(package: str, path: str) -> Path:
    """A file of a wheel, without importing the package (it would need packages of its own)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(f"the wheel {package} is not installed: run scripts/deps --reference")
    return Path(next(iter(spec.submodule_search_locations))) / path


def llama3_file() -> Path:
    return wheel_file("llama_models", "llama3/tokenizer.model")


def mistral_file() -> Path:
    return wheel_file("mistral_common", "data/tokenizer.model.v1")


def write_config(directory: Path, **entries) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")


def make_llama3(directory: Path) -> Path:
    converter = TikTokenConverter(str(llama3_file()), extra_special_tokens=LLAMA3_SPECIAL)
    tokenizer = converter.converted()
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 128000)]
            ),
        ]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(
        directory,
        chat_template=LLAMA3_TEMPLATE,
        bos_token=bos,
        eos_token="<|eot_id|>",
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
    )
    return directory


def convert_mistral(legacy: bool) -> tokenizers.Tokenizer:
    """transformers' conversion: legacy = a prefix space after every special token, else at the beginning alone."""
    slow = SimpleNamespace(vocab_file=str(mistral_file()), legacy=legacy, add_prefix_space=True)
    converter = LlamaConverter(slow)
    extracted = SentencePieceExtractor(slow.vocab_file).extract(BPE)
    tokenizer = tokenizers.Tokenizer(
        BPE(extracted["vocab"], extracted["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    if normalizer := converter.normalizer(converter.proto):
        tokenizer.normalizer = normalizer
    if pre_tokenizer := converter.pre_tokenizer("\u2581", True):
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = converter.decoder("\u2581", True)
    return tokenizer


def add_bos(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )


def make_mistral(directory: Path, kind: str = "legacy", template: str = ZEPHYR_TEMPLATE) -> Path:
    """kind: legacy | new (tokenizer.json of either prefix-space behaviour) | model (tokenizer.model alone)."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "model":
        shutil.copyfile(mistral_file(), directory / "tokenizer.model")
    else:
        tokenizer = convert_mistral(kind == "legacy")
        add_bos(tokenizer)
        tokenizer.save(str(directory / "tokenizer.json"))
    write_config(
        directory,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        tokenizer_class="LlamaTokenizer",
        legacy=kind != "new",
        clean_up_tokenization_spaces=False,
    )
    return directory


def make_phi3(directory: Path, template: str = PHI3_TEMPLATE) -> Path:
    tokenizer = convert_mistral(legacy=True)
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True, special=False)])
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=i > 0, special=True) for i, text in enumerate(PHI3_ADDED)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(
        directory,
        chat_template=template,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        add_bos_token=False,
        add_eos_token=False,
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
    )
    return directory

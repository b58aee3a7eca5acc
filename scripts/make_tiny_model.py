"""Build a tiny, randomly initialized Llama language model with its own tokenizer, in an ordinary model folder.

    python scripts/make_tiny_model.py OUTPUT_DIR [--text_files FILE ...] [--hidden_size N] [--num_layers N] ...

Whatever runs on a full-size base model runs on this one in seconds, without a download. The tokenizer is a byte-level
BPE of the texts in JSONL files (default: the training sets under data/). The same arguments give the same folder.
"""

import argparse
import filecmp
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from general_preference.files import read_object

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
TEXT_FILES = tuple(DATA_DIR / kind / "train.jsonl" for kind in ("cyclic", "transitive", "mixed"))
TEXT_KEYS = ("prompt", "responses", "chosen", "rejected", "content")
PAD, BOS, *ROLES, END = SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_POSITIONS = 2048


def iter_texts(value: object, inside_text: bool = False) -> Iterator[str]:
    """Every prompt and response of a record, whether it is text or chat messages (whose roles are no text)."""
    if isinstance(value, str) and inside_text:
        yield value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        for key, item in items:
            yield from iter_texts(item, inside_text if key is None else key in TEXT_KEYS)


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """All prompts and responses of these JSONL files, in file order."""
    lines = (line for path in paths for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip())
    return [text for line in lines for text in iter_texts(json.loads(line))]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; any text survives encoding and decoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (smallest := len(alphabet) + len(SPECIAL)):
        raise ValueError(f"vocab_size must be at least {smallest} (all bytes and the special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE, model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, num_heads: int, seed: int):
    """A randomly initialized fp32 Llama for this tokenizer; the caller's random state is left as it was."""
    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size ({hidden_size}) must be an even multiple of num_heads ({num_heads})")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_heads,
        max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        # The usual 0.02 suits widths in the thousands: a narrow model would learn slowly. 1 / sqrt(width) keeps the
        # scale of activations through each layer.
        initializer_range=hidden_size**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def make_tiny_model(
    output_dir: str | Path,
    *,
    text_files: Iterable[str | Path] | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = 2048,
    seed: int = 0,
) -> None:
    """Write the model to `output_dir` at once; a tiny model that is there is replaced, any other folder is refused.

    A folder with the same files is left alone: nodes that share it may all build it while the first one reads it.
    """
    output_dir = Path(output_dir).resolve()
    empty = not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir()))
    if not empty and not is_tiny_model(output_dir):
        raise FileExistsError(f"{output_dir} exists and is no tiny model of this script; refusing to replace it")
    tokenizer = train_tokenizer(read_texts(TEXT_FILES if text_files is None else text_files), vocab_size)
    model = build_model(tokenizer, hidden_size, num_layers, num_heads, seed)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        new_dir = Path(scratch) / "model"
        model.save_pretrained(new_dir)
        tokenizer.save_pretrained(new_dir)
        if same_files(new_dir, output_dir):
            return
        if output_dir.exists():
            output_dir.rename(Path(scratch) / "replaced")
        try:
            new_dir.rename(output_dir)
        except OSError:
            if not same_files(new_dir, output_dir):  # else another build came first
                raise


def is_tiny_model(folder: Path) -> bool:
    """Whether a folder holds what this script writes: it scales weights in its own way, and adds no head."""
    config = read_object(folder / "config.json")
    scale = (config.get("hidden_size") or 1) ** -0.5
    return config.get("initializer_range") == scale and "preference" not in config


def same_files(folder: Path, other: Path) -> bool:
    """Whether `other` holds every file of `folder`, byte for byte."""
    names = [path.name for path in folder.iterdir()]
    return not any(filecmp.cmpfiles(folder, other, names, shallow=False)[1:])


def main() -> None:
    """Build the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="model folder to write; a tiny model already there is replaced")
    parser.add_argument(
        "--text_files", "--text", nargs="+", metavar="FILE", help="JSONL of the tokenizer; default data/*/train.jsonl"
    )
    numbers = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 2048, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        make_tiny_model(**vars(arguments))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    size = sum(path.stat().st_size for path in arguments.output_dir.iterdir())
    print(f"Wrote a tiny model ({size / 1e6:.1f} MB) to {arguments.output_dir}")


if __name__ == "__main__":
    main()

"""Build a tiny, randomly initialized Llama language model with its own tokenizer, in an ordinary model folder.

Run with:

    python scripts/make_tiny_model.py OUT_DIR [--text FILE ...] [--hidden_size N] [--num_layers N] [--vocab_size N]

The folder loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``, so everything that works on a full-size base
model can be run on this one, in seconds and without a download. The tokenizer is a byte-level BPE trained on the text
of the given JSONL files (default: the training sets under ``data/``). The same arguments give the same folder.
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

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
DEFAULT_TEXT_FILES = tuple(DATA_DIR / kind / "train.jsonl" for kind in ("cyclic", "transitive", "mixed"))

PAD, BOS, USER, ASSISTANT, SYSTEM, END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT_KEYS = ("prompt", "responses", "chosen", "rejected", "content")
MAX_POSITIONS = 2048


def iter_texts(value: object, inside_text: bool = False) -> Iterator[str]:
    """Yield every prompt and response of a record, whether it is written as a string or as chat messages."""
    if isinstance(value, str):
        if inside_text:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            # Below a text key only messages' contents are text: their roles are not.
            yield from iter_texts(item, key in TEXT_KEYS)
    elif isinstance(value, list):
        for item in value:
            yield from iter_texts(item, inside_text)


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """All prompts and responses of these JSONL files, in file order."""
    texts = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    texts.extend(iter_texts(json.loads(line)))
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens; any text survives encoding and decoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (all bytes and the special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, num_heads: int, seed: int
) -> LlamaForCausalLM:
    """A randomly initialized float32 Llama for this tokenizer; the caller's random state is left as it was."""
    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size ({hidden_size}) must be an even multiple of num_heads ({num_heads})")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_POSITIONS,
        # The usual 0.02 suits widths in the thousands; in a narrow model it would all but hide one word from the last
        # token's state, and learning would start slowly. 1 / sqrt(width) keeps activations' scale through each layer.
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
    """Train the tokenizer, draw the weights and save both to ``output_dir``, replacing a model built there before.

    The folder is written beside ``output_dir`` and renamed at the end: an interrupted build leaves nothing that looks
    like a model. A folder that already holds the same files is left alone: the nodes of a run may all build it in a
    folder they share, while the first of them already reads it. One that holds anything but a model is refused.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir.exists():
        is_empty = output_dir.is_dir() and not any(output_dir.iterdir())
        is_model = (output_dir / "config.json").is_file() and (output_dir / "tokenizer.json").is_file()
        if not (is_empty or is_model):
            raise FileExistsError(f"{output_dir} exists and is not a model folder; refusing to replace it")

    tokenizer = train_tokenizer(read_texts(DEFAULT_TEXT_FILES if text_files is None else text_files), vocab_size)
    model = build_model(tokenizer, hidden_size, num_layers, num_heads, seed)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        new_dir = Path(scratch) / "model"
        new_dir.mkdir()
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


def same_files(folder: Path, other: Path) -> bool:
    """Whether ``other`` holds every file of ``folder``, byte for byte."""
    names = [path.name for path in folder.iterdir()]
    return not any(filecmp.cmpfiles(folder, other, names, shallow=False)[1:])


def main() -> None:
    """Build the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="model folder to write; a model already there is replaced")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=None,
        metavar="FILE",
        help="JSONL files of comparisons to train the tokenizer on (default: data/*/train.jsonl of this repository)",
    )
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model (default: %(default)s)")
    parser.add_argument("--num_layers", type=int, default=2, help="number of transformer layers (default: %(default)s)")
    parser.add_argument("--num_heads", type=int, default=4, help="attention heads in each layer (default: %(default)s)")
    parser.add_argument(
        "--vocab_size", type=int, default=2048, help="most tokens the tokenizer may have (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    make_tiny_model(
        args.output_dir,
        text_files=args.text,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    n_bytes = sum(path.stat().st_size for path in args.output_dir.iterdir())
    print(f"Wrote a tiny model ({n_bytes / 1e6:.1f} MB) to {args.output_dir}")


if __name__ == "__main__":
    main()

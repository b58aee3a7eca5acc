"""Tiny copies of the evaluation sets with rows of our own, laid out as on the hub or on GitHub.

python tests/evaluation_copies.py FOLDER          writes them, for a run by hand
"""

import json
import sys
from pathlib import Path

import datasets

from general_preference.evaluation.rewardbench.scoring import PRIOR_ROWS, ROWS_1

WORDS = [
    "rock",
    "paper",
    "scissors",
    "wins",
    "the",
    "throw",
    "beats",
    "every",
    "other",
    "one",
    "of course",
    "name",
    "it",
]
CORRECTNESS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
SECTIONS = {"Helpfulness/Chat": ["Casual"], "Harmlessness": ["S1", "S2"]}
SUBSETS_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus")


def text(seed: int, words: int = 0) -> str:
    """Some words, always the same ones for a seed."""
    return " ".join(WORDS[(seed * 7 + step * (seed % 5 + 1)) % len(WORDS)] for step in range(words or 2 + seed % 9))


def rewardbench() -> list[dict]:
    names = [subset for subset in ROWS_1 for _ in range(2)]
    texts = ({"prompt": text(n), "chosen": text(n + 31), "rejected": text(n + 62)} for n in range(len(names)))
    return [row | {"subset": name, "id": n} for n, (row, name) in enumerate(zip(texts, names, strict=True))]


def rewardbench_2() -> list[dict]:
    rows = []
    for n, subset in enumerate(name for name in SUBSETS_2 for _ in range(2)):
        row = {"id": str(n), "prompt": text(n), "subset": subset, "num_correct": 1, "chosen": [text(n + 17)]}
        rows.append(row | {"rejected": [text(n + 40 + i) for i in range(3)]})
    for n in range(3):
        for kind, right in (("ref", 1), ("tied", 3)):
            row = {"id": f"{kind}:{n}", "prompt": text(n + 90), "subset": "Ties", "num_correct": right}
            row["chosen"] = [text(n + 100 + i) for i in range(right)]
            rows.append(row | {"rejected": [text(n + 120 + i) for i in range(3)]})
    return rows


def prior_sets() -> dict[str, list[dict]]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    return {
        name: [{"prompt": turns, "chosen": text(n), "rejected": text(n + 9), "id": n, "subset": ""} for n in range(3)]
        for name in PRIOR_ROWS
    }


def ppe_preference() -> list[dict]:
    winners = ["model_a", "model_b", "tie", "model_a", "tie (bothbad)", "model_b", "model_a", "model_b"]
    return [
        {
            "question_id": f"q{n}", "prompt": text(n), "response_1": text(n + 11), "response_2": text(n + 23),
            "model_a": "a", "model_b": "b", "winner": winner, "language": "English" if n % 2 else "German",
            "is_code": False, "is_refusal": False, "hard_prompt": False, "easy_prompt": True, "if_prompt": False,
            "math_prompt": False, "length_a": 9, "length_b": 7, "conv_metadata": {"turns": 1},
        }
        for n, winner in enumerate(winners)
    ]  # fmt: skip


def ppe_correctness(seed: int, count: int = 32) -> list[dict]:
    rows = []
    for n in range(2):
        scores = [float((i * 5 + n + seed) % 3 == 0) for i in range(count)]
        pairs = [[i, j] for i in range(0, count, 4) for j in range(1, count, 5) if scores[i] != scores[j]]
        row = {"question_id": n, "prompt": text(n + seed), "model_name": "m", "category": "c", "scores": scores}
        row |= {f"response_{i + 1}": text(seed + n + 3 * i) for i in range(count)}
        rows.append(row | {"sampled_conflict_pairs": pairs})
    return rows


def rmb(kind: str, path: str, seed: int) -> list[dict]:
    rows = []
    for n in range(2):
        prompt = [{"role": "user", "content": text(n + seed), "language": "English"}]
        row = {"conversation_input": prompt, "category_path": f"{kind}/{path}"}
        answers = [{"llm_name": "m", "answer": text(seed + n + 5 * i), "score": 3.5} for i in range(3 + n)]
        if kind == "Pairwise_set":
            rows.append(row | {"pair_uid": f"{seed}-{n}", "chosen": answers[0], "reject": answers[1]})
        else:
            rows.append(row | {"bon_uid": f"{seed}-{n}", "bon_best": answers[0], "loser_list": answers[1:]})
    return rows


def rm_bench() -> list[dict]:
    domains = [d for d in ("chat", "code", "math", "safety-refuse", "safety-response") for _ in range(2)]
    return [
        {
            "id": n, "prompt": text(n), "domain": domain,
            "chosen": [text(n + 10 * i, 2 + 2 * i) for i in range(3)],
            "rejected": [text(n + 10 * i + 5, 2 + 2 * i) for i in range(3)],
        }
        for n, domain in enumerate(domains)
    ]  # fmt: skip


def judgebench(model: str) -> list[dict]:
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    return [
        {
            "pair_id": f"{model}{n}", "original_id": str(n), "source": sources[n % 4], "question": text(n),
            "response_model": model, "response_A": text(n + 8), "response_B": text(n + 19),
            "label": "B>A" if n % 3 else "A>B",
        }
        for n in range(12)
    ]  # fmt: skip


def m_rewardbench(language: str) -> list[dict]:
    texts = ((n, {"prompt": text(n), "chosen": text(n + 3), "rejected": text(n + 4)}) for n in range(len(ROWS_1)))
    return [row | {"id": n, "language": language, "source": s} for (n, row), s in zip(texts, ROWS_1, strict=True)]


def if_rewardbench() -> list[dict]:
    graphs = [[(0, 1), (0, 2), (1, 3)], [(2, 0)], [(0, 1), (1, 2), (2, 3), (0, 3)]]
    kinds = ("Single_Turn", "Multi_Turn", "System_Prompt")
    rows = []
    for n, (kind, graph) in enumerate(zip(kinds, graphs, strict=True)):
        edges = [{"chosen": {"response_id": a}, "rejected": {"response_id": b}} for a, b in graph]
        messages = [{"role": "user", "content": text(n)}]
        messages = [{"role": "system", "content": "Be brief."}, *messages] if kind == "System_Prompt" else messages
        row = {"id": n, "instruction_type": kind, "messages": messages, "checklist": ["short"], "constraint_type": []}
        responses = [{"response": text(n + 6 * i), "judgements": [True]} for i in range(4)]
        rows.append(row | {"responses": responses, "preference_graph": edges, "response_generation_model": "m"})
    return rows


def parquet(path: Path, rows: list[dict]) -> None:
    """Rows as a Parquet file, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def dump(path: Path, rows: list[dict]) -> None:
    """Rows as a JSON array, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_copies(folder: Path) -> Path:
    """All sets; returns the folder."""
    shard = "-00000-of-00001.parquet"
    parquet(folder / "reward-bench/data" / f"filtered{shard}", rewardbench())
    parquet(folder / "reward-bench-2/data" / f"test{shard}", rewardbench_2())
    for name, rows in prior_sets().items():
        parquet(folder / "pref-test-sets/data" / f"{name}{shard}", rows)
    parquet(folder / "lmarena-ai/PPE-Human-Preference-V1/data" / f"test{shard}", ppe_preference())
    for seed, name in enumerate(CORRECTNESS):
        parquet(folder / f"lmarena-ai/PPE-{name}-Best-of-K/data" / f"train{shard}", ppe_correctness(seed))
    for seed, kind in enumerate(("Pairwise_set", "BoN_set")):
        for number, (path, files) in enumerate(SECTIONS.items()):
            for file in files:
                place = folder / "RMB-Reward-Model-Benchmark/RMB_dataset" / kind / path / f"{file}.json"
                dump(place, rmb(kind, f"{path}/{file}", 100 * seed + 10 * number + len(file)))
    dump(folder / "RM-Bench/total_dataset.json", rm_bench())
    for split in ("gpt", "claude"):
        parquet(folder / "JudgeBench/data" / f"{split}{shard}", judgebench(split))
    for language in ("arb_Arab", "deu_Latn"):
        parquet(folder / "multilingual-reward-bench" / language / f"test{shard}", m_rewardbench(language))
    dump(folder / "IF-RewardBench/data/if_rewardbench.json", if_rewardbench())
    return folder


if __name__ == "__main__":
    write_copies(Path(sys.argv[1]))

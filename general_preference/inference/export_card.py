"""How an exported model is served and what its numbers mean: the part of its README.md under "Use"."""

from general_preference.models.config import PreferenceConfig

FORMATS = ("sequence_classification", "sentence_transformers")
_USE = {
    "sequence_classification": """
Format `sequence_classification`: transformers' `AutoModelForSequenceClassification` ({architecture}), vLLM and SGLang
read this folder (OUT below), and `GPMPipeline("OUT")` gives the scores of the model that was exported.

```bash
vllm serve OUT --runner pooling                                   # port 8000, POST /classify
python -m sglang.launch_server --model-path OUT --is-embedding    # port 30000, POST /v1/embeddings
```
""",
    "sentence_transformers": """
Format `sentence_transformers`: `SentenceTransformer("OUT").encode(texts)` and servers of embeddings ({architecture})
read this folder (OUT below). Nothing is normalized.

```bash
vllm serve OUT --runner pooling --convert embed                   # port 8000, POST /v1/embeddings
```
""",
}
_CLIENT = """
A server answers raw numbers for each text (`"use_activation": false`), which this client asks for and compares:

```python
from general_preference.inference.remote import RemotePreference

rm = RemotePreference("http://127.0.0.1:8000", "OUT"){api}
prompt, responses = "Which throw wins?", ["Play rock.", "Play paper.", "Play scissors."]
rm.compare(prompt, responses[0], responses[1])  # P(first is preferred)
rm.preference_matrix(prompt, responses)  # (K, K) probabilities, row over column
rm.rank(prompt, responses)  # indices, best first
```

Other clients do what follows, with token ids where the server takes them.
"""
_API = '  # SGLang: and api="embeddings"'
_TEXTS = {
    "chat": """
The prompt as the chat template renders it with the generation prompt, the response behind it, and behind that, once,
the end token `{eos}` (id {eos_id}), which clients append where the template does not. {gate}
""",
    "released": """
The conversation as the chat template renders it, tokenized with special tokens again, its last token overwritten by the
end token `{eos}` (id {eos_id}). {gate}
""",
    "sequence_classification": """
The conversation as `apply_chat_template` tokenizes it{cut_off}. {gate}
""",
    "openrlhf": """
The conversation as the chat template renders it, without new lines at its end. Where it does not end in the end token
`{eos}` (id {eos_id}), a space and that token follow. {gate}
""",
}
_PROMPTS = {
    "chat": "The gate's text is the prompt alone, so rendered, without the end token.",
    "released": "The gate's text is the first message alone, so rendered and tokenized, without the end token.",
    **dict.fromkeys(
        ("sequence_classification", "openrlhf"), "The gate's text is the tokens with which all conversations begin."
    ),
}


def serving(preference: PreferenceConfig, format: str, architecture: str, tokenizer, hidden: int) -> str:
    """Markdown: commands, a snippet, the texts to send, and how `hidden` features become embeddings and scores."""
    passed_over = preference.pad_token_id
    texts = _TEXTS[preference.input_format].format(
        eos=tokenizer.eos_token,
        eos_id=tokenizer.eos_token_id,
        cut_off="" if passed_over is None else f", without the tokens {passed_over} at its end",
        gate=_PROMPTS[preference.input_format] if preference.prompt_gate else "",
    )
    if preference.max_length:
        texts += f"\nAt most {preference.max_length} tokens: the prompt's oldest are cut first, never the end."
    parts = [
        _USE[format].format(architecture=architecture).strip(),
        _CLIENT.format(api=_API if format == FORMATS[0] else "").strip(),
        f"### Texts\n\n{texts.strip()}\nThe numbers are read at the last token.",
        "### Numbers\n\n" + "\n".join(_numbers(preference, hidden)),
    ]
    return "\n\n".join(parts)


def _numbers(preference: PreferenceConfig, hidden: int) -> list[str]:
    """What the D + P numbers are, and the formulas from them to a probability."""
    dim, planes = preference.dim, preference.planes
    lines, terms = [], []
    if planes:
        how = ", divided by its L2 norm" if preference.normalize else ", as it is"
        lines.append(f"- 0 to {2 * planes - 1}: the embedding e of a response{how}")
        gate = "gate[p] * " * preference.prompt_gate
        terms.append(f"Σ_p {gate}(e1[2p] * e2[2p+1] - e1[2p+1] * e2[2p])")
    if dim % 2:
        lines.append(f"- {dim - 1}: the reward r of a response")
        if preference.reward_offset:
            lines[-1] += f" without its constant {preference.reward_offset:+.6g}, on which scores do not depend"
        terms.append("r1 - r2")
    if preference.prompt_gate:
        scaled = f"gate = {planes} * softmax(z / sqrt({hidden}))"
        weights = scaled if preference.gate == "scaled_softmax" else "gate = softmax(z)"
        lines.append(f"- {dim} to {dim + planes - 1}: of the gate's text, the logits z of its planes: {weights}")
    probability = f"sigmoid(score / {preference.temperature:.6g})"
    return [*lines, "", f"score = {' + '.join(terms)}", "", f"P(first is preferred) = {probability}"]

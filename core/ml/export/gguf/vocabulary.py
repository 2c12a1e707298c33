"""A tokenizer as GGUF metadata. Only shapes of tokenizers are written that llama.cpp is known to read the same way."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from core.errors import GraftError
from core.ml import prompts, tokens
from core.ml.prompts import Contract

# How GPT-2, Llama 3 and Qwen 2 cut text into words, as their tokenizer.json says it, and llama.cpp's names for it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CUTS = {("bytes",): "gpt-2", ("digits", "bytes"): "smollm", (_LLAMA3,): "llama-bpe", (_QWEN2,): "qwen2"}
_SPACE = "\u2581"
_NO_SCORES = "its merges do not follow from scores of tokens, as SentencePiece's do"
_PREPENDS = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}


def write(writer: GGUFWriter, contract: Contract, size: int) -> None:
    """Add the vocabulary of `size` tokens, merges, special tokens and the chat template.

    Raises:
        GraftError: `gguf_not_supported`, with the reason.
    """
    tokenizer = contract.tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    if whole["model"]["type"] != "BPE":
        raise unsupported(f"its tokenizer is of type {whole['model']['type']}, not BPE")
    if size < len(tokenizer):
        raise unsupported("its tokenizer has more tokens than the model")
    for token in whole["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise unsupported(f"its token {token['content']} takes the white space around it in")
    if whole["model"]["byte_fallback"]:
        _add_pieces(writer, whole, size)
    else:
        _add_bytes(writer, whole, size)
    _add_special(writer, contract)


def adds_start(contract: Contract) -> bool:
    """Whether whoever reads the file puts the start token before a prompt; our own prompts then begin with it."""
    if not tokens.starts_with_bos(contract.tokenizer):
        return False
    if contract.rows == "text":
        return True
    ids = prompts.encode_prompt(contract, [{"role": "user", "content": "Say hello."}])
    return ids[0] == contract.tokenizer.bos_token_id


def unsupported(reason: str) -> GraftError:
    return GraftError(
        "gguf_not_supported",
        f"This model cannot be written as GGUF here: {reason}.",
        status=422,
        hint='Export it as "merged" and convert it with llama.cpp\'s convert_hf_to_gguf.py.',
    )


def _add_bytes(writer: GGUFWriter, whole: dict[str, Any], size: int) -> None:
    """Byte-level BPE: GPT-2 and its heirs."""
    cut = _cut(whole["pre_tokenizer"])
    if cut not in _CUTS:
        raise unsupported("its tokenizer cuts text into words in a way that is not known here")
    # NFC, which Qwen asks for, is what text nearly always is; llama.cpp leaves it as it stands.
    plain = whole["normalizer"] in (None, {"type": "NFC"})
    if not plain or whole["model"].get("ignore_merges", False) != (cut == (_LLAMA3,)):
        raise unsupported("its tokenizer changes text before it cuts it, or merges in an order of its own")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_CUTS[cut])
    names, types = _tokens(whole, size)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(whole)])


def _cut(step: dict[str, Any] | None) -> tuple[str, ...]:
    """A pre-tokenizer in short: its patterns, `bytes` where the byte level has GPT-2's own; () where unknown."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    short = []
    for i, part in enumerate(steps):
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(own)} if i + 1 == len(
                steps
            ):
                short += ["bytes"] if own else []
            case {"type": "Digits", "individual_digits": True}:
                short.append("digits")
            case {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            }:
                short.append(pattern)
            case _:
                return ()
    return tuple(short) if steps[-1] and steps[-1]["type"] == "ByteLevel" else ()


def _add_pieces(writer: GGUFWriter, whole: dict[str, Any], size: int) -> None:
    """SentencePiece's BPE: Llama 2 and Mistral. llama.cpp merges by scores, so they must say what the merges do."""
    if whole["normalizer"] != _PREPENDS or whole["pre_tokenizer"] is not None:
        raise unsupported(
            "llama.cpp puts a space before every text between control tokens, this tokenizer does not always"
        )
    names, types = _tokens(whole, size)
    scores = _scores(whole)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([scores.get(name, 0.0) for name in names])
    writer.add_token_types(types)
    writer.add_add_space_prefix(True)


def _scores(whole: dict[str, Any]) -> dict[str, float]:
    """Scores of pieces that lead to the same merges: the earlier a piece is made, the better.

    This holds where each piece is made by every pair of known pieces that gives it, and by all of them at once.
    """
    added = {token["content"] for token in whole["added_tokens"]}
    known = whole["model"]["vocab"].keys() - added
    made: dict[str, set[tuple[str, str]]] = {}
    last = ""
    for left, right in _merges(whole):
        piece = left + right
        if piece in made and piece != last:
            raise unsupported(_NO_SCORES)
        made.setdefault(piece, set()).add((left, right))
        last = piece
    for piece in known:
        splits = {(piece[:i], piece[i:]) for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= known}
        if splits != made.get(piece, set()):
            raise unsupported(_NO_SCORES)
    return {piece: -float(place) for place, piece in enumerate(made, start=1)}


def _tokens(whole: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    names = {i: name for name, i in whole["model"]["vocab"].items()}
    added = {token["id"]: token for token in whole["added_tokens"]}
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if whole["model"]["byte_fallback"] else set()
    listed, types = [], []
    for i in range(size):
        if (token := added.get(i)) is not None:
            name, kind = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            if name == whole["model"]["unk_token"] and bytes_:
                kind = TokenType.UNKNOWN
        elif i in names:
            name = names[i]
            kind = TokenType.BYTE if name in bytes_ else TokenType.NORMAL
        else:
            name, kind = f"[PAD{i}]", TokenType.UNUSED
        listed.append(name)
        types.append(kind)
    return listed, types


def _merges(whole: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in whole["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _add_special(writer: GGUFWriter, contract: Contract) -> None:
    tokenizer = contract.tokenizer
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    first, *more = contract.stop_token_ids
    writer.add_eos_token_id(first)
    if more:
        writer.add_eot_token_id(more[0])
    writer.add_add_bos_token(adds_start(contract))
    writer.add_add_eos_token(False)
    if contract.rows == "turns":
        writer.add_chat_template(tokenizer.chat_template)

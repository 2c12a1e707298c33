"""Chat templates of real model families, in our own formatting, each with a small tokenizer of its kind."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_WORDS = (
    "system user assistant model tool Say hello How are you Fine Be brief the a of and [INST] [/INST] SYS"
)


@dataclass(frozen=True)
class Family:
    """`answer` is what is trained of an answer, `last` the same for the last turn where that differs."""

    template: str
    answer: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    last: str = ""
    pieces: str | None = None
    adds_bos: bool = False
    swallows: tuple[str, ...] = ()
    system: str = "template"
    tools: str = "text"
    trims: bool = False

    def trained(self, *answers: str) -> list[str]:
        *inner, last = answers
        return [self.answer.format(a) for a in inner] + [(self.last or self.answer).format(last)]


CHATML = """\
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set rest = messages[1:] -%}{%- set system = messages[0]['content'] -%}
{%- else -%}
  {%- set rest = messages -%}{%- set system = false -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- if loop.index0 == 0 and system != false -%}
    {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] -%}
  {%- else -%}
    {%- set content = message['content'] -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' + content.strip() + ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('Only user and assistant roles are supported') -}}
  {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{%- for message in messages -%}
  {%- set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
      + message['content'] | trim + '<|eot_id|>' -%}
  {{- bos_token + text if loop.first else text -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '[INST] ' + message['content'] + ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' + message['content'] + eos_token -}}
  {%- else -%}
    {{- raise_exception('Only user and assistant roles are supported') -}}
  {%- endif -%}
{%- endfor -%}
"""

ZEPHYR = """\
{%- for message in messages -%}
  {%- if message['role'] in ['user', 'system', 'assistant'] -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
  {%- endif -%}
  {%- if loop.last and add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
{%- endfor -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
  {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

QWEN = """\
{%- set given = messages[0]['role'] == 'system' -%}
{{- '<|im_start|>system\\n' -}}
{{- messages[0]['content'] if given else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -}}
{%- if tools -%}
  {{- '\\n\\n# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif message.tool_calls -%}
    {{- '<|im_start|>' + message.role -}}
    {%- if message.content -%}{{- '\\n' + message.content -}}{%- endif -%}
    {%- for call in message.tool_calls -%}
      {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif not (given and loop.first) -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

PHI3 = """\
{%- for message in messages -%}
  {%- if message['role'] in ['system', 'user', 'assistant'] -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FAMILIES = {
    "chatml": Family(CHATML, "{}<|im_end|>\n", _IM, eos="<|im_end|>", bos="<|im_start|>"),
    "llama2": Family(
        LLAMA2,
        " {} </s>",
        ("<unk>", "<s>", "</s>"),
        "</s>",
        "<s>",
        pieces="always",
        adds_bos=True,
        trims=True,
    ),
    "llama3": Family(
        LLAMA3,
        "{}<|eot_id|>",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        trims=True,
    ),
    "mistral": Family(
        MISTRAL,
        " {}</s>",
        ("<unk>", "<s>", "</s>"),
        "</s>",
        "<s>",
        pieces="first",
        adds_bos=True,
        system="text",
    ),
    # Its tokenizer reads a space into the text after every token.
    "zephyr": Family(ZEPHYR, "{}</s> \n", ("<unk>", "<s>", "</s>"), "</s>", "<s>", pieces="always"),
    "gemma": Family(
        GEMMA,
        "{}<end_of_turn>\n",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        adds_bos=True,
        system="text",
        trims=True,
    ),
    "qwen": Family(QWEN, "{}<|im_end|>\n", _IM, eos="<|im_end|>", tools="template"),
    # Its tokens swallow the white space after them.
    "phi3": Family(
        PHI3,
        "{}<|end|>",
        ("<|endoftext|>", *_PHI),
        eos="<|endoftext|>",
        last="{}<|end|><|endoftext|>",
        swallows=_PHI,
    ),
}
# The tokenizer of a base model that was never taught to chat.
BASES = {
    "bytes": Family("", "{}<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "always": Family("", "{}</s>", ("<unk>", "<s>", "</s>"), "</s>", "<s>", pieces="always", adds_bos=True),
    "first": Family("", "{}</s>", ("<unk>", "<s>", "</s>"), "</s>", "<s>", pieces="first", adds_bos=True),
}


def tokenizer(family: Family, template: str | None = None) -> PreTrainedTokenizerFast:
    raw = _pieces(family) if family.pieces else _bytes(family)
    raw.add_special_tokens(
        [AddedToken(token, rstrip=token in family.swallows, normalized=False) for token in family.tokens]
    )
    if family.adds_bos and family.bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, raw.token_to_id(family.bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=family.eos)
    if family.bos:
        made.bos_token = family.bos
    if chosen := template if template is not None else family.template:
        made.chat_template = chosen
    return made


def save(family: Family, folder: Path, template: str | None = None) -> Path:
    tokenizer(family, template).save_pretrained(folder)
    return folder


def _bytes(family: Family) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and its heirs have it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(family.tokens), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([_WORDS, "\n\n \n\n  .\n"], trainer)
    return raw


def _pieces(family: Family) -> Tokenizer:
    """BPE with a mark for spaces and bytes for what it does not know, as SentencePiece makes it."""
    spaces = pre_tokenizers.Metaspace(prepend_scheme=family.pieces, split=False)
    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    learning.train_from_iterator([_WORDS], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(learning.to_str())["model"]
    names = [*family.tokens, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    raw = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(dict.fromkeys(names))},
            [tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.pre_tokenizer = spaces
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw

"""Chat templates that a recipe can name, written from each family's documentation of its prompt format.

chatml    OpenAI's Chat Markup Language: <|im_start|>role, newline, text, <|im_end|>
llama3    Llama 3 model card, "prompt format": <|start_header_id|>role<|end_header_id|>, blank line, text, <|eot_id|>
alpaca    Stanford Alpaca, README, "data release": a preamble, ### Instruction:, ### Response:
mistral   Mistral 7B Instruct model card: [INST] text [/INST] answer, end of sequence; no role for the system
exaone    EXAONE 3.5 model card: [|system|], [|user|] and [|assistant|], each turn but the user's ends in [|endofturn|]
"""

from __future__ import annotations

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_ALPACA = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set preamble = messages[0]['content'] -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set preamble = 'Below is an instruction that describes a task. Write a response that appropriately completes the \
request.' -%}
{%- set turns = messages -%}
{%- endif -%}
{{- bos_token + preamble + '\\n\\n' -}}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' -}}
{%- else -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set ahead = namespace(text='') -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ahead.text = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- '[INST] ' + ahead.text + message['content'] + ' [/INST]' -}}
{%- set ahead.text = '' -%}
{%- endif -%}
{%- endfor -%}
"""

_EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "alpaca": _ALPACA,
    "mistral": _MISTRAL,
    "exaone": _EXAONE,
}

# tokens each template is of little use without
MARKERS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
    "mistral": (),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
}

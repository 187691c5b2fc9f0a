"""The templates of conversations in Jinja's language, for transformers' apply_chat_template."""

import json
from collections.abc import Sequence

from data.chat import ENDING, OPENING, TEMPLATES
from data.tokens import AnyTokenizer, ending, opening


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def jinja(name: str, system: str, tokenizer: AnyTokenizer) -> str:
    """The template of this name of data/chat.py; system is its default system message, "" for none.

    It gives the text that `render` of data/chat.py puts into tokens, for messages that are as
    `check_messages` wants them.
    """
    template = TEMPLATES[name]
    names = {OPENING: opening(tokenizer), ENDING: ending(tokenizer)}

    def joined(parts: Sequence[str], content: str = "") -> str:
        """An expression for the parts, in which `content` is one for the message."""
        found = []
        for part in parts:
            before, *behind = [quoted(names.get(text, text)) for text in part.split("{}")]
            found += [before, content, *behind] if behind else [before]
        return " ~ ".join(text for text in found if text != '""') or '""'

    strip = " | trim" if template.strips else ""
    system_text = joined(template.system, "system_message")
    answer = (*template.ask, template.answer, template.end, *template.behind)
    before, within = f"{{{{- {system_text} -}}}}", ""
    if len(template.system) == 1:  # then it stands in the question behind it
        before, within = "", f"{{%- set content = {system_text} ~ content -%}}"
    lines = f"""
{{%- set system_message = {quoted(system)} -%}}
{{%- set rest = messages -%}}
{{%- if messages[0]['role'] == 'system' -%}}
{{%- set system_message = messages[0]['content']{strip} -%}}
{{%- set rest = messages[1:] -%}}
{{%- endif -%}}
{{{{- {joined(template.begin)} -}}}}
{{%- if system_message -%}}{before}{{%- endif -%}}
{{%- for message in rest -%}}
{{%- set content = message['content']{strip} -%}}
{{%- if message['role'] == 'user' -%}}
{{%- if loop.first and system_message -%}}{within}{{%- endif -%}}
{{{{- {joined(template.user, "content")} -}}}}
{{%- else -%}}
{{{{- {joined(answer, "content")} -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- {joined(template.ask)} -}}}}{{%- endif -%}}
"""
    return lines.lstrip()

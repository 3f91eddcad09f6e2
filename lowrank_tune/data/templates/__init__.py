"""Chat templates: from the messages of a conversation to token ids and the mask of the trained ones.

`chat_template` is the interface. It uses the template of the tokenizer (`jinja`, with its parts `renderer`,
`generation_prompt`, `spans`, `placeholders`, `encoder` and `date`), or one of the two in `fallback`.
"""

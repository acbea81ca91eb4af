"""Names of the files that belong to a model beside its weights: one list for downloads and for copies.

Those of tokenizers are the vocabulary files of transformers' tokenizer classes (a test compares them).
"""

from __future__ import annotations

from bot.merge.checkpoints.tensor_names import words

TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder with a file NAME.jinja for each further template

# those from tokenizer.model on are vocabularies of slow tokenizers
TOKENIZER_FILES = words(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja "
    "chat_template.json tokenizer.model vocab.json merges.txt vocab.txt spiece.model sentencepiece.bpe.model "
    "sentencepiece.model spm.model spm_char.model source.spm target.spm target_vocab.json vocab-src.json "
    "vocab-tgt.json bpe.codes dict.txt prophetnet.tokenizer byte_maps.json entity_vocab.json emoji.json "
    "normalizer.json word_pronunciation.json word_shape.json tekken.json"
)

OTHER_FILES = words(
    "generation_config.json preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "audio_tokenizer_config.json"
)

"""The merge engine. Usable alone; of the bot it knows only `bot.errors`.

    text --recipe--> Recipe            recipe.py (YAML, guard) document.py grammar.py spec.py contract.py
    folder | Hub --> Checkpoint        checkpoint.py header.py (headers only)
    Recipe + Checkpoints --> Plan      plan.py: architecture.py layout.py parameters.py steps.py tokenizer.py rows.py
    Plan + folders --> OUT             engine.py: execution.py views.py gather.py passes/ writer.py provenance.py

Nothing above the last line imports torch.
"""

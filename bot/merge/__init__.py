"""The merge engine. Usable alone; of the bot it knows only `bot.errors` and the version.

    recipe/        text -> Recipe: the guard, the language, what each method asks for
    checkpoints/   folder | Hub -> Checkpoint, Adapter: headers and configs only
    tokens/        vocabularies -> which row of which matrix each token takes; chat templates
    planning/      Recipe + Checkpoints -> Plan
    methods/       the methods on whole tensors: what everything faster is held against
    operands/      what a step reads: stored tensors, LoRA patches, gathered rows, piece by piece
    passes/        the methods on operands, piece by piece
    execution/     Plan + folders -> OUT: the engine, a step's lane, the writer, provenance, stages
    verify.py      is OUT what its provenance says?

Each imports only those above it (tests/test_house.py). No module before methods/ imports torch when it is loaded.
"""

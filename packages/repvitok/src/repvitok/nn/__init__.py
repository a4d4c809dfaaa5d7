"""The parts of the tokenizer's transformer: rotary positions, attention, blocks, patches."""

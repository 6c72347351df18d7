"""The policy: its network, tokenizer and dialogues, and the engine that samples replies from it."""

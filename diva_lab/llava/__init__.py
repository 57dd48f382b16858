"""What a tuned encoder does for a language model that sees through it: LLaVA folders, made, trained and asked."""

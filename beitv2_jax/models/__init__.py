"""What is computed: layers, transformer, quantizer, tokenizer, masked image model, classifier, teachers."""

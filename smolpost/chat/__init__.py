"""How a conversation becomes text and tokens: templates, rendering, masks, reasoning blocks, miniature tokenizers."""

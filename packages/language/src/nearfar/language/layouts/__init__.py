"""The published layouts of whole language models, one file a layout."""

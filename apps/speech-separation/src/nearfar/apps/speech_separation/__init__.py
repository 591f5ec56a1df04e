"""The speech-separation app."""

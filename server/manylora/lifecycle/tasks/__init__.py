"""What is trained to do other things than to write: labels, vectors, answers out of a text, transcripts."""

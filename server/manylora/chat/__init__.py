"""Chats: what a template is given beside the messages, and how what a model writes is read, tools included."""

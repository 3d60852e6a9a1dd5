"""One study a method: the article, and the numbers that decide its claim."""

"""Commands that put methods to work for a user, found through the `kexue.commands` entry points."""

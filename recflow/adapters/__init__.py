"""Where recflow touches the world: storage, tracking, downloads."""

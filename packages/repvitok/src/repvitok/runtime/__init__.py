"""What every command, trainer and model of the three packages runs on: nothing here knows of video."""

from flashnorm_cli.cli import main

main()

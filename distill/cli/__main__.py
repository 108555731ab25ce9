from distill.command import main

main()

# This file makes the folder a package: none of that name elsewhere, installed or where one stands, goes before it.

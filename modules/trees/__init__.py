"""Token trees and the builders that grow them."""
